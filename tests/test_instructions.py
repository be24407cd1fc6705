import json
import re

import pytest
from llm_servers import MODEL, serve

from configs import default
from jdmdr.llm import instructions
from jdmdr.types import UserError
from jdmdr.workdir import bring_up_to_date

ROWS = [
    {"instruction": f"{'Summarize' if i % 2 else 'Rewrite'} text {i}.", "input": f"Text number {i} is long.",
     "output": f"It is number {i}.", "source": f"s{i}"}
    for i in range(20)
]  # fmt: skip
WORDS = {"sw": "Maandishi ya habari", "ru": "Краткий текст новостей", "en": "Text"}


def translation(lang, row, **changes):
    found = {key: f"{WORDS[lang]} {row[key]}" if lang == "sw" else WORDS[lang] for key in instructions.FIELDS}
    return {"lang": lang, **found, **changes}


def gathered(directory, config, langs, **keys):
    """What the stage writes: language -> rows."""
    config.tune.langs, config.tune.samples = langs, 9
    config.tune.instructions = str(directory / "rows.json")
    for key, value in keys.items():
        config.tune[key] = value
    (directory / "rows.json").write_text(json.dumps(ROWS))
    stage = instructions.stage(config, directory / "workdir")
    lines = []
    bring_up_to_date(stage, directory / "workdir", False, lines.append)
    out = directory / "workdir" / instructions.STAGE
    return {p.stem: [json.loads(line) for line in p.read_text().splitlines()] for p in out.glob("*.jsonl")}


def translator(bad=lambda lang, source: None):
    """Answers as a translator; `bad(language, English row)` is what it says instead."""

    def answer(request, number):
        row = json.loads(request.messages[-1]["content"])
        lang = "sw" if "Swahili" in request.messages[0]["content"] else "ru"
        return bad(lang, row) or json.dumps(translation(lang, row), ensure_ascii=False)

    return answer


def asking(server):
    config = default.get_config()
    config.llm.base_url, config.llm.model, config.llm.retries = server.base_url, MODEL, 0
    return config


def test_summaries_with_an_input_are_selected_whatever_their_case():
    rows = [
        {"id": "1", "instruction": "SUMMARISE it", "input": "x", "output": "y", "source": "s"},
        {"id": "2", "instruction": "summarize it", "input": " ", "output": "y"},
        {"id": "3", "instruction": "Give the Key Points.", "input": "x", "output": "y"},
        {"id": "4", "instruction": "Sum the numbers.", "input": "1 2", "output": "3"},
        {"id": "5", "instruction": "tl;dr", "input": "x", "output": ""},
    ]
    found = instructions.selected(rows, default.get_config().tune.pattern)
    assert [row["id"] for row in found] == ["1", "3"] and "source" not in found[0]


def test_every_language_has_its_share_and_a_second_run_asks_nothing(tmp_path):
    with serve(translator()) as server:
        found = gathered(tmp_path, asking(server), "sw,en,ru")
        assert {lang: len(found[lang]) for lang in ("sw", "en", "ru")} == {"sw": 3, "en": 3, "ru": 3}
        assert len(server.requests) == 6  # English is not asked for
        assert {row["lang"] for row in found["sw"]} == {"sw"} and not found["failed"]
        originals = {row["id"]: row for row in found["selected"]}
        assert len(originals) == 10 and all("Summarize" in row["instruction"] for row in originals.values())
        for row in found["sw"]:
            assert row["output"] == f"{WORDS['sw']} {originals[row['id']]['output']}"
        assert [row["id"] for row in found["sw"]] != [row["id"] for row in found["ru"]]
        (tmp_path / "workdir" / instructions.STAGE / "manifest.json").unlink()
        assert gathered(tmp_path, asking(server), "sw,en,ru") == found and len(server.requests) == 6


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (lambda row: json.dumps({key: row[key] for key in instructions.FIELDS}), "instruction is written in Latin"),
        (lambda row: json.dumps(translation("ru", row, output=" ")), "output is empty"),
        (lambda row: "I would rather not.", "the reply is no object of instruction, input, output"),
        (lambda row: json.dumps(translation("ru", row, input=5)), "the reply is no object of instruction, input, output"),
    ],
)  # fmt: skip
def test_a_failed_translation_is_written_down_and_the_next_row_takes_its_place(tmp_path, bad, reason):
    first = []

    def once(lang, row):
        first.append(row)
        return bad(row) if len(first) == 1 else None

    with serve(translator(once)) as server:
        config = asking(server)
        config.llm.concurrency = 1
        found = gathered(tmp_path, config, "ru,en,sw")
    assert [row["reason"] for row in found["failed"]] == [reason] and len(found["ru"]) == 3
    assert found["failed"][0]["id"] not in {row["id"] for row in found["ru"]}


def test_a_plan_tells_the_calls_that_are_then_made(tmp_path):
    bad = lambda lang, row: "no" if row["instruction"].endswith("7.") else None
    with serve(translator(bad)) as server:
        config = asking(server)
        config.tune.langs, config.tune.samples = "sw,en,ru", 9
        config.tune.instructions = str(tmp_path / "rows.json")
        (tmp_path / "rows.json").write_text(json.dumps(ROWS))
        table = lambda: instructions.plan(config, tmp_path / "workdir")
        calls = lambda: [int(n) for n in re.findall(r"^\D+ (\d+) .* \d+ s$", table(), re.M)]
        assert calls() == [6, 6, 20] and not server.requests
        gathered(tmp_path, config, "sw,en,ru")
        assert 6 <= len(server.requests) <= 8
        assert calls() == [0, 0, 20 - len(server.requests)]


def test_english_kept_as_the_translation_into_a_latin_language_is_dropped(tmp_path):
    same = lambda lang, row: json.dumps(row) if lang == "sw" else None
    with serve(translator(same)) as server:
        found = gathered(tmp_path, asking(server), "sw,en")
    assert found["sw"] == [] and len(found["en"]) == 4 and len(found["failed"]) == 10
    assert {row["reason"] for row in found["failed"]} == {"instruction is still in English"}


def test_translations_come_from_a_file(tmp_path):
    given = [translation("ru", row) for row in ROWS]  # without their originals: all are taken to be selected
    given += [
        {**translation("sw", row), **{f"original_{key}": row[key] for key in instructions.FIELDS}} for row in ROWS
    ]
    given[-1]["instruction"] = given[-1]["original_instruction"]
    path = tmp_path / "translations.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in given))
    found = gathered(tmp_path, default.get_config(), "sw,en,ru", translations=str(path), samples=30)
    assert (len(found["sw"]), len(found["en"]), len(found["ru"])) == (9, 10, 10)
    assert [(row["lang"], row["id"], row["reason"]) for row in found["failed"]] == [
        ("sw", "40", "instruction is still in English")
    ]


def test_a_list_and_lines_are_read_alike(tmp_path):
    (tmp_path / "list.json").write_text("\n" + json.dumps(ROWS, indent=1))
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert instructions.read(tmp_path / "list.json") == instructions.read(tmp_path / "lines.jsonl")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[{"instruction": "x", "output": "y"}, {"instruction": "x"}]', "row 2: no output"),
        ('{"instruction": "x", "output": "y"}\n{"instruction": 5, "output": "y"}', "line 2: no instruction"),
        ('{"instruction": "x", "output": "y"}\n{"instr', "line 2: not valid JSON"),
        ('[{"instruction": "x",', "is not valid JSON"),
        ("5", "line 1: an object with instruction, input, output is expected"),
    ],
)
def test_a_bad_row_is_told_with_its_place(tmp_path, text, told):
    (tmp_path / "rows").write_text(text)
    with pytest.raises(UserError, match=told):
        instructions.read(tmp_path / "rows")


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"instructions": ""}, "tune.instructions is not set"),
        ({"instructions": "nowhere.json"}, "there is no file nowhere.json"),
        ({"langs": "en,xx-1"}, "'xx-1' is no language code"),
        ({"langs": "en,en"}, "each once"),
        ({"langs": "en,sw,ru"}, "tune.langs has sw, ru, and nothing translates"),
    ],
)
def test_what_cannot_start_is_told_in_a_sentence(tmp_path, keys, told):
    config = default.get_config()
    (tmp_path / "rows.json").write_text("[]")
    config.tune.instructions, config.tune.langs = str(tmp_path / "rows.json"), "en"
    config.tune.update(keys)
    with pytest.raises(UserError, match=told):
        instructions.stage(config, tmp_path)
