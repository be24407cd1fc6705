import os

import jax
import pytest
from conftest import TINYPEDIA, tiny_config

from jdmdr import costs, encoders, hardware, perf, plan, progress, sizes
from jdmdr.sizes import Data, Known
from jdmdr.types import UserError

DATA = Data(*(Known(value, "given") for value in (1000, 50, 300, 40, 10)))


@pytest.fixture
def config():
    c = tiny_config(TINYPEDIA)
    with c.unlocked():
        c.mine.retrievers, c.mine.depth, c.mine.negatives, c.mine.texts = "warmup,bm25", 20, 5, True
        c.train.batch_size, c.train.passages_per_query, c.train.steps = 8, 4, 10
        c.encode.dtype = "float16"
    return c


@pytest.fixture(scope="module")
def encoder():
    return encoders.EncoderConfig("transformer", vocab_size=100, width=16, layers=2, heads=2, ffn=64, max_positions=64)


def costs_of(config, encoder):
    forward = lambda tokens: perf.forward_flops(encoder, tokens)
    trained, steps = {"warmup": 5000, "train": 3000}, {"warmup": 0, "train": 10}
    found = costs.stage_costs(config, DATA, encoder, 5000, trained, steps, forward)
    return {cost.stage: cost for cost in found}


def test_bytes_on_disk_are_those_of_a_sum_by_hand(config, encoder):
    found = costs_of(config, encoder)
    assert found["tokens"].disk == 1000 * (50 * 2 + 8) + 40 * (10 * 2 + 8)
    assert found["embeddings"].disk == found["embeddings-warmup"].disk == 1040 * 16 * 2
    assert found["mine"].disk == 40 * 20 * 3 * costs.TREC_LINE
    assert found["negatives"].disk == 40 * 5 * 8 + 40 * 6 * 300
    assert found["train"].disk == 2 * 12 * 3000 + 4 * 5000, (
        "two checkpoints of what trains, both moments too; the parameters"
    )
    assert found["warmup"].disk == 4 * 5000
    large = costs_of(config, encoders.EncoderConfig("static", vocab_size=70_000, width=16))
    assert large["tokens"].disk - found["tokens"].disk == (1000 * 50 + 40 * 10) * 2, (
        "ids of a large vocabulary take 4 bytes"
    )


def test_flops_are_those_of_a_sum_by_hand(config, encoder):
    def forward(tokens):  # multiplications and additions of the layers' matrices, and of attention
        return 2 * tokens * 2 * (4 * 16 * 16 + 2 * 16 * 64) + 2 * 2 * 2 * tokens * tokens * 16

    found = costs_of(config, encoder)
    step = 8 * (forward(10) + 4 * forward(50))
    assert found["train"].flops == 10 * 3 * step and found["train"].steps == 10
    assert found["embeddings"].flops == 1000 * forward(50) + 40 * forward(10)
    with config.unlocked():
        config.train.grad_cache = 4
    assert costs_of(config, encoder)["train"].flops == 10 * 4 * step, "one more forward pass"


def test_a_recipe_that_searches_while_it_trains_mines_nothing(config, encoder):
    with config.unlocked():
        config.train.objective.name, config.train.passages_per_query = "adore", 0
    assert not {"mine", "negatives"} & costs_of(config, encoder).keys()


def test_a_finished_run_has_the_bytes_that_were_planned(finished):
    data = sizes.find_data(finished.config, finished.directory, {})
    encoder, params = finished._model("train")
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    found = costs.stage_costs(
        finished.config, data, encoder, count, {"warmup": count, "train": count}, {"warmup": 6, "train": 6}, float
    )
    planned = {cost.stage: cost.disk for cost in found}

    def on_disk(stage, *patterns):
        paths = [path for pattern in patterns for path in (finished.directory / stage).rglob(pattern) if path.is_file()]
        assert paths
        return sum(path.stat().st_size for path in paths)

    # a header for each .npy file; and vectors of the queries that are held out, which the plan does not count
    header, tolerance = 128, 0.02 + finished.config.data.valid_share
    assert planned["tokens"] == pytest.approx(
        on_disk("tokens", "passages/*", "queries.train/*") - 8 * header, rel=tolerance
    )
    vectors = on_disk("embeddings", "passages-*", "queries.train-*")
    assert planned["embeddings"] == pytest.approx(vectors - 4 * header, rel=tolerance)
    assert planned["corpus"] == pytest.approx(on_disk("corpus", "passages.*", "docid*"), rel=0.25)
    spared = costs.CHECKPOINTS - sum(1 for _ in (finished.directory / "train" / "checkpoints").glob("[0-9]*"))
    train = planned["train"] - spared * 12 * count  # the latest is the best, as it may be
    assert train == pytest.approx(on_disk("train", "*"), rel=0.1)
    assert planned["export"] == pytest.approx(on_disk("export", "model.safetensors"), rel=0.02)


def test_sizes_are_counted_in_a_data_root_and_flags_come_first(config):
    with config.unlocked():
        config.data.root, config.data.langs = str(TINYPEDIA), "en"
    data = sizes.find_data(config, None, {"query_tokens": 9.0})
    with open(TINYPEDIA / "corpus" / "en.jsonl", encoding="utf-8") as lines:
        assert data.passages == Known(sum(1 for _ in lines), "counted")
    with open(TINYPEDIA / "train" / "en.jsonl", encoding="utf-8") as lines:
        assert data.queries.value == pytest.approx(sum(1 for _ in lines) * (1 - config.data.valid_share))
    assert data.query_tokens == Known(9.0, "given") and "assumed" in data.passage_tokens.how
    given = sizes.find_data(config, None, {"passages": 5e6, "queries": 100.0, "passage_tokens": 1e6})
    assert given.passages.value == 5e6
    assert given.passage_tokens == Known(config.encoder.passage_length, "encoder.passage_length")


def test_a_long_file_is_counted_by_a_sample(config, tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "SAMPLE", 4096)
    (tmp_path / "corpus").mkdir()
    text = "x" * 500
    lines = [f'{{"docid": "{i:06}", "title": "", "text": "{text}"}}\n' for i in range(9000)]
    (tmp_path / "corpus" / "en.jsonl").write_text("".join(lines))
    with config.unlocked():
        config.data.root, config.data.langs = str(tmp_path), ""
    data = sizes.find_data(config, None, {})
    assert data.passages.value == pytest.approx(9000, rel=0.3) and data.passages.how == "from a sample"
    assert data.passage_bytes.value == 500


@pytest.mark.parametrize(
    "shape, millions", [("xlm-roberta-large", 559), ("xlm-roberta-base", 277), ("mbert", 177), ("minilm", 22.6)]
)
def test_named_shapes_have_the_parameters_of_their_checkpoints(config, shape, millions):
    encoder, _ = sizes.find_encoder(config, shape, "bfloat16")  # without the pooler
    params = jax.eval_shape(encoders.build(encoder).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6 == pytest.approx(millions, rel=0.01)


def test_mistakes_are_told_with_what_to_write_instead(config):
    with pytest.raises(UserError, match="--hardware a100: there are figures of h100"):
        hardware.find("a100")
    with pytest.raises(UserError, match="--shape gpt: there are xlm-roberta-base"):
        sizes.find_encoder(config, "gpt", "float32")


def test_an_encoder_that_cannot_be_fetched_needs_a_shape(config, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with config.unlocked():
        config.encoder.name = "nobody/no-such-encoder"
    with pytest.raises(UserError, match="no-such-encoder.* --shape .*xlm-roberta-large"):
        sizes.find_encoder(config, "", "float32")


def test_sending_is_added_to_computing():
    table = plan.sending_table({"gradient": 3e9, "passages": 1e9}, 0.12, 50e9)
    rows = {line.split("  ")[0]: line.split() for line in table.splitlines()}
    assert rows["gradient"][-2:] == ["60.00", "ms"] and rows["all"][-2:] == ["80.00", "ms"]
    assert rows["efficiency, if nothing overlaps"][-1] == "60.0%"


def test_units_are_chosen_for_reading():
    assert [progress.size(x) for x in (0, 999, 1500, 2.5e9, 3e15)] == ["0 B", "999 B", "1.5 kB", "2.5 GB", "3.0 PB"]
    assert [plan.hours(x) for x in (0, 5, 90, 7200)] == ["", "5 s", "1.5 min", "2.0 h"]


def test_the_command_plans_for_hardware_that_is_not_here(command):
    words = ["--config", "configs/dmdr.py", "--shape", "minilm", "--hardware", "h100", "--devices", 4]
    numbers = ["--passages", 1e6, "--queries", 24_000, "--mfu", 0.4, "--nocompile"]
    done = command("jdmdr.plan", *words, *numbers, env={"XLA_FLAGS": ""})
    assert done.returncode == 0, done.stderr
    lines = {line.split("  ")[0].strip(): line for line in done.stdout.splitlines()}
    assert "4 x NVIDIA H100, 80.0 GB each" in lines["hardware"] and "given" in lines["reached of it"]
    # 1 M passages and 24 k queries of 384 numbers in float16
    assert "786.4 MB" in lines["embeddings"]
    assert " 4000 " in lines["train"] or lines["train"].split()[3] == "20000", lines["train"]
    assert not os.path.exists("runs/plan")


@pytest.mark.slow
def test_the_command_compiles_the_step_of_this_machine(command):
    done = command("jdmdr.plan", "--config", "configs/quickstart.py:smoke")
    assert done.returncode == 0, done.stderr
    assert "largest found" in done.stdout and "train.grad_cache" in done.stdout
    wrong = command("jdmdr.plan", "--config", "configs/quickstart.py:smoke", "--passages", -1)
    assert wrong.returncode == 2 and "--passages is -1.0; it is above 0" in wrong.stderr


def test_only_slices_of_tpus_are_compiled_for_by_their_own_compiler(monkeypatch):
    assert hardware.tpu_mesh("h100", 8) is None and hardware.tpu_mesh("v5e", 3) is None
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: None)
    assert hardware.tpu_mesh("v5e", 8) is None


@pytest.mark.slow
@pytest.mark.parametrize(("slice_", "chips"), [("v5e", 8), ("v5p", 4)])
def test_the_training_step_compiles_ahead_of_time_for_tpus(on_devices, slice_, chips):
    pytest.importorskip("libtpu", reason="pip install libtpu")
    program = """
        import sys
        from jdmdr import encoders, fit, hardware
        from configs import default
        mesh = hardware.tpu_mesh(sys.argv[1], int(sys.argv[2]))
        assert {device.platform for device in mesh.devices.flat} == {"tpu"}, mesh
        encoder = encoders.EncoderConfig(
            "transformer", vocab_size=1000, width=128, layers=2, heads=2, ffn=512, max_positions=130, dtype="bfloat16"
        )
        section = default.training()
        section.steps = 10
        for grad_cache in (0, 4):
            section.grad_cache = grad_cache
            print(fit.step_bytes(encoder, section, (16, 64), 16, mesh))
    """
    needed = [int(line) for line in on_devices(1, program, slice_, chips).split()]
    assert len(needed) == 2 and all(1e6 < bytes_ < 1e9 for bytes_ in needed)
