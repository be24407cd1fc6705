import numpy as np
import pytest
from llm_servers import MODEL, faults, oracle, serve

from configs import default
from jdmdr import llm, topup
from jdmdr.llm.generate import generate
from jdmdr.llm.judging import Verdict
from jdmdr.topup import Found, Judged, Short
from jdmdr.types import NO_HIT, Hits

TEXTS = [f"passage {i} tells of thing {i} and no more" for i in range(60)]


def top_up(shorts, relevant=(), lists=None, directory=None, answer=None, **keys):
    """Tops up toy queries; `lists` are the rows that the n-th search finds, `relevant` what the judge calls a right answer.

    Returns what was searched for, what was judged per query and call, and the server's requests.
    """
    c = default.get_config()
    c.expand.update(keys)
    asked, judged = [], []
    answer = answer or oracle(None, ask=lambda summary: f"query {len(asked)} of {summary}")

    def search(shorts, texts, depth):
        rows_QxK = np.full((len(texts), depth), NO_HIT)
        for q, text in enumerate(texts):
            found = (lists or [range(10, 60)])[min(len(asked), len(lists or [0]) - 1)]
            rows_QxK[q, : len(found)] = list(found)[:depth]
            asked.append(text)
        return Hits(rows_QxK, np.where(rows_QxK == NO_HIT, -np.inf, 100.0 - np.arange(depth)).astype(np.float32))

    async def judge(short, rows):
        judged.append((short.place, list(rows)))
        verdicts = []
        for row in rows:
            if sum(v.kept for v in verdicts) == short.wanted:
                break
            verdicts.append(Verdict(2 * (row in relevant), row not in relevant, "llm"))
        return verdicts

    with serve(answer) as server:
        c.llm.base_url, c.llm.model, c.llm.retries, c.llm.concurrency = server.base_url, MODEL, 0, 1
        with llm.open_client(c.llm, directory) as client:

            async def write(short, number):
                about = f"q{short.place}"
                words = lambda text: len(text.split())
                return await generate(client, "en", about, TEXTS[short.place], about, number, words, c.expand, 0)

            topup.top_up(shorts, write, search, judge, client.map, c.expand, "en")
    return asked, judged, server.requests


def short(place, missing, mined=(), seen=()):
    rows_K = np.array([*mined, NO_HIT])
    return Short(place, missing, {place, *seen}, [Found(0, rows_K, -np.arange(len(rows_K), dtype=np.float32))])


def kept(s):
    return [j for j in s.judged if j.verdict.kept]


def test_what_the_new_query_finds_is_judged_and_appended_in_rank_order_until_enough(tmp_path):
    one, none = short(0, 3), short(1, 2, mined=[1], seen=[1])  # the second has no survivor at all
    asked, judged, requests = top_up([one, none], {11}, [[0, 10, 11, 12, 13, 14]], tmp_path, depths=(5, 6))
    assert [a.row for a in kept(one)] == [10, 12, 13] and [a.row for a in kept(none)] == [0, 10]
    assert kept(one)[1] == Judged(12, "llm", 1, 4, 97.0, Verdict(0, True, "llm"))
    assert judged == [(0, [10, 11, 12, 13]), (1, [0, 10, 11, 12, 13])]
    assert len(requests) == 4 and len(asked) == 2
    assert [r["generated_query"] for r in one.rounds + none.rounds] == asked


def test_positives_and_what_was_looked_at_before_are_never_judged(tmp_path):
    s = short(0, 9, seen=[12, 14])
    _, judged, _ = top_up([s], (), [[12, 0, 10, 14, 10, 15], [10, 0, 16]], tmp_path, rounds=2, depths=(6,))
    assert judged == [(0, [10, 15]), (0, [16])]
    assert [(a.row, a.rank, a.number) for a in kept(s)] == [(10, 3, 1), (15, 6, 1), (16, 3, 2)]


def test_rounds_go_on_for_the_short_alone_and_end_when_all_have_enough(tmp_path):
    shorts = [short(0, 1), short(1, 2), short(2, 9)]
    lists = [[10, 11, 20], [10, 20], [20], [10, 11], [12], [13]]  # round 1: three queries, round 2: two, round 3: one
    asked, _, requests = top_up(shorts, {20}, lists, tmp_path, depths=(3,))
    assert [len(s.rounds) for s in shorts] == [1, 2, 3] and len(asked) == 6 and len(requests) == 12
    assert [[a.row for a in kept(s)] for s in shorts] == [[10], [10, 11], [12, 13]]


def test_deeper_comes_after_the_rounds_in_the_old_list_first(tmp_path):
    s = short(0, 9, mined=[30, 31, 32, 33, 34], seen=[30, 31])  # stage I looked at the first two
    _, judged, _ = top_up([s], {33}, [[10, 11, 12, 13, 14]], tmp_path, rounds=1, depths=(2, 4, 5))
    assert judged == [(0, [10, 11]), (0, [32, 33, 12, 13]), (0, [34, 14])]
    assert [(a.row, a.source, a.rank) for a in kept(s)] == [
        (10, "llm", 1), (11, "llm", 2), (32, "retrieval", 3), (12, "llm", 3), (13, "llm", 4), (34, "retrieval", 5), (14, "llm", 5)
    ]  # fmt: skip


def test_a_spoilt_round_is_told_and_the_next_one_goes_on(tmp_path):
    s = short(0, 1)
    good = lambda request: oracle(None, ask=lambda summary: "a new query")(request, 0)
    asked, _, _ = top_up([s], (), [[10]], tmp_path, faults("text", "empty", "refusal", text=good), depths=(3,))
    assert asked == ["a new query"] and [a.number for a in kept(s)] == [3]
    assert [r["fault"] for r in s.rounds] == ["empty", "summary: refused", ""]


def test_a_query_written_before_is_not_searched_for_again(tmp_path):
    s = short(0, 2)
    asked, _, requests = top_up([s], (), [[10]], tmp_path, oracle(None, ask=lambda summary: "the same"), depths=(3,))
    assert asked == ["the same"] and len(requests) == 6
    assert [r["fault"] for r in s.rounds] == ["", "written in an earlier round", "written in an earlier round"]


@pytest.mark.parametrize("rounds", [0, 3])
def test_nothing_short_asks_for_nothing(tmp_path, rounds):
    asked, judged, requests = top_up([short(0, 0)], (), None, tmp_path, rounds=rounds)
    assert not asked and not judged and not requests


def test_without_rounds_the_old_lists_are_all_there_is(tmp_path):
    s = short(0, 2, mined=range(30, 40), seen=range(30, 32))
    _, _, requests = top_up([s], {33}, None, tmp_path, rounds=0, depths=(2, 10))
    assert [a.row for a in kept(s)] == [32, 34] and not requests
