import pytest

QUICKSTART = "configs/quickstart.py"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "--config is missing"),
        (("--config",), "--config is missing"),
        (("--config", "configs/nope.py", "--workdir", "W"), "configs/nope.py: there is no such file"),
        (("--config", QUICKSTART), "--workdir is missing"),
        (("--config", QUICKSTART, "--workdir"), "Missing value for flag --workdir"),
        (("--config", QUICKSTART, "--workdir", "/proc/none"), "--workdir /proc/none"),
        (("--config", QUICKSTART, "--workdir", "W", "--config.data.rot=x"), "did you mean data.root"),
        (("--config", QUICKSTART, "--workdir", "W", "--config.train=x"), "is a group of keys"),
        (
            ("--config", QUICKSTART, "--workdir", "W", "--config.train.steps=abc"),
            "--config.train.steps=abc: not a value",
        ),
        (("--config", QUICKSTART, "--workdir", "W", "--bogus"), "flag 'bogus'"),
        (("--config", QUICKSTART, "--workdir", "W", "stray"), "'stray' belongs to no flag"),
        (("--config", QUICKSTART + ":tiny", "--workdir", "W"), "'tiny' behind the colon is not known"),
        (("--config", QUICKSTART, "--workdir", "W", "--config.data.root=/none"), "/none"),
        (("--config", QUICKSTART, "--workdir", "W", "--config.data.langs=xx"), "xx"),
        (
            ("--config", QUICKSTART, "--workdir", "W", "--config.mine.retrievers=colbert"),
            "mine.retrievers: 'colbert' is neither a retriever nor a directory",
        ),
    ],
)
def test_wrong_command_line_gets_one_sentence_and_exit_code_2(command, tmp_path, arguments, sentence):
    result = command("jdmdr.pipeline", *[str(tmp_path) if a == "W" else a for a in arguments])
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert sentence in result.stderr


@pytest.mark.parametrize(("body", "where"), [("x", "line 1: NameError"), ("(", "line 1: SyntaxError")])
def test_broken_recipe_is_told_with_file_and_line(command, tmp_path, body, where):
    path = tmp_path / "broken.py"
    path.write_text(f"def get_config(): {body}\n")
    result = command("jdmdr.pipeline", "--config", path, "--workdir", tmp_path / "w")
    assert result.returncode == 2 and f"{path}, {where}" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("module", ["jdmdr.pipeline", "jdmdr.train", "jdmdr.mine"])
def test_help_shows_the_command_and_every_key(command, module):
    result = command(module, "--help")
    assert result.returncode == 0
    assert f"python -m {module}" in result.stdout and "c.train = training()" in result.stdout


def test_a_rule_that_a_recipe_sets_is_switched_off_by_none(command, tmp_path):
    arguments = ("--config", QUICKSTART, "--workdir", tmp_path, "--config.mine.retrievers=bm25")
    refused = command("jdmdr.mine", *arguments)
    assert refused.returncode == 2 and "filters.percent_of_positive compares the scores of an encoder" in refused.stderr
    # with the rule off the command goes on to the next mistake
    off = command("jdmdr.mine", *arguments, "--config.filters.percent_of_positive=None", "--config.name=bm25")
    assert off.returncode == 2 and "name is 'bm25'" in off.stderr
