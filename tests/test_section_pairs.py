"""Weak pairs: articles are linked and aligned as they should, nothing of an evaluation is among them, batches hold what they
say."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import SHARED, TINYPEDIA

from configs import clir_pretrain
from jdmdr import articles, pair_batches, section_pairs
from jdmdr.cloze import split_sentences
from jdmdr.pairs import PairTokenizer
from jdmdr.section_pairs import Sections, align
from jdmdr.types import UserError

WEIGHTS = SimpleNamespace(cosine=1.0, items=1.0, position=0.5, threshold=0.6)
TEXT = "One sentence of some words stands here. A second sentence of words follows it."


def row(place, of, items=()):
    return {"place": place, "of": of, "items": list(items)}


def write_articles(directory, by_lang):
    directory.mkdir(parents=True, exist_ok=True)
    for lang, rows in by_lang.items():
        full = [
            {"id": str(i), "sections": [{"heading": "", "text": TEXT}] * 3, **found} for i, found in enumerate(rows)
        ]
        (directory / f"{lang}.jsonl").write_text("".join(json.dumps(found) + "\n" for found in full))
    return directory


def made(tmp_path, sources, monolingual=False, embed=None, min_words=5):
    found = articles.parse(sources)
    section_pairs.write_sections(found, min_words, tmp_path / "sections")
    sections = {path.stem: Sections(path) for path in sorted((tmp_path / "sections").glob("*.jsonl"))}
    counts = section_pairs.write_pairs(sections, WEIGHTS, monolingual, embed, tmp_path / "pairs")
    read = lambda name: [json.loads(line) for line in (tmp_path / "pairs" / f"{name}.jsonl").read_text().splitlines()]
    return sections, counts, read


def test_every_passage_of_a_parallel_collection_finds_its_own(tmp_path):
    sections, counts, read = made(tmp_path, f"parallel:{TINYPEDIA}@en+th")
    assert counts == {"en-th": 192}  # 64 articles outside `test` of 3 passages
    for pair in read("en-th"):
        assert pair["src"] == pair["tgt"] and pair["score"] == 1
        same = pair["src"].split("#")[0]
        others = [f"{same}#{i}" for i in range(3) if f"{same}#{i}" != pair["src"]]
        assert pair["neg_tgt"] == others == pair["neg_src"]
    tested = {line.split()[2].split("#")[0] for line in (TINYPEDIA / "qrels" / "en.test.tsv").read_text().splitlines()}
    assert tested and not tested & {name.split("/")[1].split("#")[0] for name in sections["en"].ids}


@pytest.mark.skipif(not (SHARED / "xquad-r").is_dir(), reason="XQuAD-R is not here")
def test_no_article_that_xquad_r_is_evaluated_on_is_among_its_pairs():
    root = SHARED / "xquad-r"
    clean = {line.split("\t")[0] for line in (root / "topics" / "de.clean.tsv").read_text().splitlines()}
    judged = [line.split() for line in (root / "qrels" / "de.test.tsv").read_text().splitlines()]
    asked = {docid.split("-")[1] for qid, _, docid, _ in judged if qid in clean}
    languages, _ = articles.read(articles.parse(f"xquad_r:{root}@de+zh")[0])
    for lang, of in languages.items():
        found = list(of())
        assert len(asked) == len(found) == 24 and not asked & {a.id for a in found}, lang
        assert sum(len(a.sections) for a in found) == 120


def test_links_join_titles_by_any_chain(tmp_path):
    directory = write_articles(tmp_path / "a", {
        "de": [{"title": "Fluss", "links": {"en": "River"}}, {"title": "Berg", "concept": "Q8502"}],
        "en": [{"title": "Mountain", "concept": "Q8502"}, {"title": "River"}],
        "fr": [{"title": "Fleuve", "links": {"de": "Fluss"}}, {"title": "Mer"}],
    })  # fmt: skip
    languages, files = articles.read(articles.parse(f"articles:{directory}")[0])
    concepts = {lang: {a.title: a.concept for a in of()} for lang, of in languages.items()}
    assert concepts["de"]["Fluss"] == concepts["en"]["River"] == concepts["fr"]["Fleuve"] is not None
    assert concepts["de"]["Berg"] == concepts["en"]["Mountain"] == "Q8502" and concepts["fr"]["Mer"] is None
    assert [path.name for path in files] == ["de.jsonl", "en.jsonl", "fr.jsonl"]
    _, counts, _ = made(tmp_path, f"articles:{directory}")
    assert counts == {"de-en": 6, "de-fr": 3, "en-fr": 3}


def test_two_sources_with_equal_names_stay_apart_but_for_wikidata(tmp_path):
    one = write_articles(tmp_path / "one", {"en": [{"title": "a", "concept": "1"}, {"title": "b", "concept": "Q1"}]})
    two = write_articles(tmp_path / "two", {"de": [{"title": "x", "concept": "1"}, {"title": "y", "concept": "Q1"}]})
    _, counts, read = made(tmp_path, f"articles:{one},articles:{two}")
    assert counts == {"de-en": 3} and {pair["src"].split("#")[0] for pair in read("de-en")} == {"1/1"}


def test_sections_are_aligned_by_what_they_have():
    one, two = [row(i, 4) for i in range(4)], [row(i, 4) for i in range(4)]
    assert [pair[:2] for pair in align(one, two, WEIGHTS, None)] == [(i, i) for i in range(4)]
    # the vectors say that two sections changed places; the lead stays with the lead whatever they say
    cosine = np.eye(4)[[3, 2, 1, 0]]
    assert [pair[:2] for pair in align(one, two, WEIGHTS, cosine)] == [(0, 0), (1, 2), (2, 1)]
    # linked items: position alone would take neighbours
    one = [row(0, 3, "a"), row(1, 3, "bc"), row(2, 3, "de")]
    two = [row(0, 3, "a"), row(1, 3, "de"), row(2, 3, "xbc")]
    found = align(one, two, WEIGHTS, None)
    assert [pair[:2] for pair in found] == [(0, 0), (1, 2), (2, 1)]
    assert found[1][2] == pytest.approx((1.0 * 2 / 3 + 0.5 * 0.5) / 1.5)
    strict = SimpleNamespace(**{**vars(WEIGHTS), "threshold": 0.9})
    assert [pair[:2] for pair in align(one, two, strict, None)] == [(0, 0)]
    # one to one: what two want goes to the one it wants
    assert align([row(1, 3), row(2, 3)], [row(2, 3)], WEIGHTS, None) == [(1, 0, 1.0)]


def test_sections_too_short_are_left_out_and_keep_their_place(tmp_path):
    sections = [{"text": TEXT}, {"text": "Too short."}, {"text": TEXT, "heading": "Last"}]
    directory = write_articles(
        tmp_path / "a", {lang: [{"title": "t", "concept": "Q1", "sections": sections}] for lang in ("de", "en")}
    )
    found, counts, _ = made(tmp_path, f"articles:{directory}")
    assert found["de"].ids == ["0/0#0", "0/0#2"] and counts == {"de-en": 2}


@pytest.mark.parametrize("sources, sentence", [
    ("", "pretrain.sources is empty"),
    ("tinypedia", "a source is KIND:DIR, and the kinds are articles"),
    ("articles:/nowhere", "/nowhere is not a directory"),
    (f"parallel:{TINYPEDIA}@xx", "has no language xx; there are: ar, en"),
])  # fmt: skip
def test_wrong_sources_are_told(sources, sentence):
    with pytest.raises(UserError, match=sentence):
        for source in articles.parse(sources):
            articles.read(source)


def test_a_damaged_article_is_told_with_its_line(tmp_path):
    directory = write_articles(tmp_path / "a", {"de": [{"title": "t"}, {"title": 3}]})
    languages, _ = articles.read(articles.parse(f"articles:{directory}")[0])
    with pytest.raises(UserError, match=r"de.jsonl, line 2: no title; an article is"):
        list(languages["de"]())
    (directory / "de.jsonl").write_text('{"id": "1", "title": "t", "sections": [{}]}\n')
    with pytest.raises(UserError, match="a section of the article '1' has no text"):
        list(languages["de"]())


# --------------------------------------------------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """Pairs of two languages and within them, their tokens and tokenizer."""
    from jdmdr.tokenizer import add_pair_tokens, train_unigram

    home = tmp_path_factory.mktemp("pairs")
    sections, _, _ = made(home, f"parallel:{TINYPEDIA}@en+es", monolingual=True)
    train_unigram((found["text"] for of in sections.values() for found in of), 900, home / "tokenizer")
    add_pair_tokens(home / "tokenizer")
    tokenizer = PairTokenizer(str(home / "tokenizer"), 128)
    pair_batches.write_section_tokens(sections, tokenizer, home / "tokens")
    section_tokens = pair_batches.SectionTokens(home / "tokens", sorted(sections), tokenizer.vocab_size)
    pairs = pair_batches.read_pairs(home / "pairs", sections, lambda lang, row: True)
    return sections, section_tokens, pairs, tokenizer, home / "tokenizer"


def keys(**changes):
    p = clir_pretrain.get_config().pretrain.copy_and_resolve_references()
    p.batch_size, p.length, p.query_length, p.negatives = 8, 128, 32, 2
    for key, value in changes.items():
        (p.objective if key in p.objective else p)[key] = value
    return p


def test_sections_are_their_sentences(tokens):
    sections, section_tokens, _, tokenizer, _ = tokens
    texts = [found["text"] for lang in ("en", "es") for found in sections[lang]]
    for row in (0, 5, len(sections["en"]), len(texts) - 1):
        expected = np.concatenate(tokenizer.ids(split_sentences(texts[row])))
        np.testing.assert_array_equal(section_tokens.ids(section_tokens.sentences(row)), expected)


def test_a_batch_is_a_pure_function_of_the_step_and_of_one_pair_of_languages(tokens):
    _, section_tokens, pairs, tokenizer, _ = tokens
    batches = pair_batches.PairBatches(section_tokens, pairs, tokenizer, keys(bi_weight=1.0), 0, 1)
    again = pair_batches.PairBatches(section_tokens, pairs, tokenizer, keys(bi_weight=1.0), 0, 1)
    groups = set()
    for step in range(6):
        (one, figures), (two, _) = batches.make(step), again.make(step)
        groups.add(figures["pair"])
        assert {"qlm", "rr", "bi"} <= one.keys()
        for key in one:
            for a, b in zip(np.atleast_1d(one[key]) if key[:2] == "ma" else [one[key]], np.atleast_1d(two[key]) if key[:2] == "ma" else [two[key]], strict=True):  # fmt: skip
                assert str(a) == str(b)
        assert len(one["qlm"].ids_BxT) == 8 and len(one["rr"].ids_BxT) == 24 and one["bi_ids_B"].shape == (8,)
    assert len(groups) > 1 and batches.shapes == len(batches.widths)


def test_turns_take_the_parts_one_after_another(tokens):
    _, section_tokens, pairs, tokenizer, _ = tokens
    batches = pair_batches.PairBatches(section_tokens, pairs, tokenizer, keys(schedule="alternate"), 0, 1)
    assert [sorted({"qlm", "rr"} & batches.make(step)[0].keys()) for step in range(4)] == [["qlm"], ["rr"]] * 2
    assert batches.shapes == 2 * len(batches.widths)
    alone = pair_batches.PairBatches(section_tokens, pairs, tokenizer, keys(qlm_weight=0.0), 0, 1)
    assert alone.parts == ("rr",)
    with pytest.raises(UserError, match="no weight above 0"):
        pair_batches.PairBatches(section_tokens, pairs, tokenizer, keys(qlm_weight=0.0, rr_weight=0.0), 0, 1)


@pytest.mark.parametrize("mode", pair_batches.MASK_MODES)
def test_only_tokens_of_the_side_to_be_masked_are(mode, tokens):
    _, section_tokens, pairs, tokenizer, _ = tokens
    batch, _ = pair_batches.PairBatches(section_tokens, pairs, tokenizer, keys(mask_mode=mode), 0, 1).make(0)
    block = batch["qlm"]
    used = batch["mask_w_BxP"] > 0
    for row in range(8):
        at = batch["mask_pos_BxP"][row][used[row]]
        segment = block.segments_BxT[row, at]
        assert block.mask_BxT[row, at].all() and len(set(at)) == len(at) >= 1
        assert mode == "mixed" or (segment == (mode == "document")).all()
        assert not np.isin(batch["mask_tgt_BxP"][row][used[row]], tokenizer.special_ids).any()
    assert (batch["rr"].ids_BxT != tokenizer.mask_id).all()


def test_a_sentence_stands_in_no_document_that_it_asks_for(tokens):
    _, section_tokens, pairs, tokenizer, _ = tokens
    own = np.flatnonzero(pairs.source_n == pairs.target_n)
    batches = pair_batches.PairBatches(section_tokens, pairs, tokenizer, keys(), 0, 1)
    random = np.random.default_rng(0)
    for index in own[:40]:
        found = batches._example(index, random, 0)[0]
        whole = section_tokens.ids(section_tokens.sentences(found.row))
        text, query = " ".join(map(str, found.document)), " ".join(map(str, found.query))
        assert query not in text and len(found.document) < len(whole)


def test_weak_pairs_train_a_bi_encoder_in_the_languages_that_it_has(tokens, library, tmp_path):
    from jdmdr import sources
    from jdmdr.tokenizer import Tokenizer

    home = tmp_path / "made"
    sections, counts, read = made(home, f"parallel:{TINYPEDIA}@en+es+sw", monolingual=True)
    words = Tokenizer(tokens[4], 64)
    found = section_pairs.write_training(home, library.langs, 0, tmp_path / "weak", words, words)
    # en and sw: documents of theirs, with queries of all three languages; a language's pairs with itself count once
    assert found == {lang: sum(n for name, n in counts.items() if lang in name.split("-")) for lang in ("en", "sw")}
    training_set = sources.weak(tmp_path / "weak", library, words.vocab_size)
    assert len(training_set.lang_n) == sum(found.values()) and set(training_set.lang_n) == {0, 1}
    ids = training_set.passage_row
    assert ids.min() >= library.bases[-1] and len(set(ids)) == len(sections["en"]) + len(sections["sw"])
    same = np.flatnonzero(ids == ids[0])
    documents = [training_set.passages.gather(np.array([row]), 64).ids_BxT.tolist() for row in same]
    assert len(same) > 2 and documents.count(documents[1]) == len(same) - 1  # and that of its own query lacks it
    with pytest.raises(UserError, match="no pair with a document in xx; its languages are en, es, sw"):
        section_pairs.write_training(home, ["xx"], 0, tmp_path / "other", words, words)
    with pytest.raises(UserError, match="holds no pairs; name a working directory"):
        section_pairs.write_training(tmp_path, ["en"], 0, tmp_path / "other", words, words)
