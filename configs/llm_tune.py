"""The language model that summarises and asks, tuned on summarisation instructions in 16 languages (DMDR, section 3.4).

    make llm-env
    .venv-llm/bin/python -m jdmdr.llm.tune --config configs/llm_tune.py --workdir runs/llm \\
        --config.tune.model=DIR --config.tune.instructions=FILE \\
        --config.llm.base_url=http://localhost:8000/v1 --config.llm.model=NAME

DIR holds a Qwen3, Llama 3 or Gemma 3 with a chat template, FILE instructions such as Alpaca's. The server translates them:
937 calls where every translation is of use; `--dry_run` tells more. Then `runs/llm/merged` is a Hugging Face directory, to be
served with `vllm serve runs/llm/merged` and named in `llm.model`.

Hardware: one host. A model of N billion parameters takes 2 N GB of its devices' memory for its weights in bfloat16, and
activations besides; the disk holds it twice. Time was not measured on an accelerator.
Expect: the loss in `adapter/log.jsonl` falls. The paper tunes Llama-3.1-70B-Instruct and gives no figure of the tuning.

`configs/llm_tune.py:smoke` takes 5 steps on at most 16 instructions in English alone.
"""

from configs import default


def get_config(arg=""):
    c = default.smoke(default.get_config(), arg)
    if arg:
        c.tune.langs, c.tune.samples, c.tune.steps = "en", 16, 5
        c.tune.batch_size, c.tune.chunk_rows, c.tune.length, c.tune.checkpoint_every = 4, 2, 256, 2
    return c
