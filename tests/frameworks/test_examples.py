"""The programs of docs/frameworks.md, in one process and in two as ``torchrun`` starts them.

Left out of ``make test``: they need the extra ``frameworks``. ``make test-frameworks`` runs them.
"""

import os
import re
import socket
import warnings
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from learned_opt import NFNOpt
from tests.processes import Ranks

PAGE = Path(__file__).parents[2] / "docs" / "frameworks.md"
PROGRAMS = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.S | re.M))
pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.filterwarnings("ignore"),  # of the frameworks
]


def changed(name, *changes):
    """A program of the page with some of its text replaced."""
    program = PROGRAMS[name]
    for old, new in changes:
        assert old in program
        program = program.replace(old, new)
    return program


def run(program):
    """Its names at the end."""
    torch.manual_seed(0)
    names = {"__name__": "program"}
    exec(compile(program, str(PAGE), "exec"), names)
    return names


def inner(optimizer):
    """Without what a framework puts around it."""
    return optimizer if isinstance(optimizer, NFNOpt) else optimizer.optimizer


def ended(names):
    """Weights and state in their bits, the share of weights on labels, the last step, and the rate."""
    optimizer = inner(names["optimizer"])
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parts = [p.detach().reshape(-1).float() for p in parameters]
    parts += [x.reshape(-1).float() for p in parameters for x in optimizer.state[p].values()]
    bits = torch.cat([x.cpu() for x in parts]).view(torch.int32)
    independent = "independent axes" in repr(optimizer)
    return {"bits": bits, "covered": 0.0 if independent else optimizer.symmetry.summary()["covered"]}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield tmp_path
    forget()


def forget():
    """What accelerate keeps for a whole process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)


# ------------------------------------------------------------------------------------- two processes
@pytest.fixture(scope="module")
def ranks():
    pool = Ranks(2, ("accelerate", "lightning", "transformers.trainer", "transformers.models.gpt2.modeling_gpt2"))
    yield pool
    pool.close()


def started(rank, program, folder, port):
    """A rank of ``torchrun``: the framework makes the process group of what the environment says."""
    dist.destroy_process_group()
    there = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    there |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
    os.environ.update({k: str(v) for k, v in there.items()}, ACCELERATE_USE_CPU="true")
    os.chdir(folder)
    try:
        return ended(run(program))
    finally:
        forget()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ------------------------------------------------------------------------------------- resumed
TRAINER, LIGHTNING, ACCELERATE = "Trainer of transformers", "Lightning", "accelerate"
TWO = {LIGHTNING: [("devices=1", 'devices=2, strategy="ddp"')]}  # how the page says that two are wanted
RESUMED = {
    TRAINER: [("trainer.train()", 'trainer.train(resume_from_checkpoint="runs/checkpoint-4")')],
    LIGHTNING: [("fit(model, data)", 'fit(model, data, ckpt_path="runs/epoch=0.ckpt")')],
    ACCELERATE: [("for epoch in range(epochs)", 'accelerator.load_state("runs/0")\nfor epoch in range(1, epochs)')],
}
BFLOAT16 = {
    TRAINER: [("save_steps=4", "save_steps=4, bf16=True, use_cpu=True")],
    LIGHTNING: [("devices=1", 'devices=1, precision="bf16-mixed"')],
    ACCELERATE: [("Accelerator()", 'Accelerator(mixed_precision="bf16")')],
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_finds_its_symmetry_and_resumes_to_the_bit(name):
    whole = ended(run(PROGRAMS[name]))
    forget()
    assert whole["covered"] >= 0.9
    assert torch.equal(ended(run(changed(name, *RESUMED[name])))["bits"], whole["bits"])


@pytest.mark.parametrize("name", BFLOAT16)
def test_a_run_in_mixed_precision_finds_its_symmetry(name):
    assert ended(run(changed(name, *BFLOAT16[name])))["covered"] >= 0.9


def test_submodules_that_lightning_calls_one_by_one_are_named():
    groups = ("NFNOpt(self.parameters()", 'NFNOpt([{"params": m.parameters()} for m in self.children()]')
    names = run(changed(LIGHTNING, ("(self(x), y)", "(self.head(self.encoder(x)), y)"), groups))
    assert ended(names)["covered"] >= 0.7


@pytest.mark.parametrize("name", RESUMED)
def test_two_processes_end_equal_and_resume_to_the_bit(name, ranks, own_folder):
    two = TWO.get(name, [])
    whole = [o.get() for o in ranks(started, changed(name, *two), str(own_folder), free_port())]
    again = [o.get() for o in ranks(started, changed(name, *RESUMED[name], *two), str(own_folder), free_port())]
    assert all(found["covered"] >= 0.9 for found in whole)
    assert all(torch.equal(found["bits"], whole[0]["bits"]) for found in whole + again)


# ------------------------------------------------------------------------------------- the others
@pytest.mark.parametrize(("dora", "share"), [(False, 0.9), (True, 0.8)])
def test_adapters_find_their_symmetry(dora, share):
    names = run(changed("PEFT", ("use_dora=False", f"use_dora={dora}")))
    assert ended(names)["covered"] >= share
    moved = [n for n, p in names["model"].named_parameters() if names["optimizer"].state.get(p)]
    assert moved and all("lora" in n for n in moved)


@pytest.mark.parametrize("groups", [False, True])
def test_timm_makes_one_that_keeps_the_rules_decay_or_has_timms(groups):
    grouped = ("model.parameters(), ", "model, "), ("weight_decay=None", "weight_decay=0.01, layer_decay=0.7")
    names = run(changed("timm", *(grouped if groups else ())))
    assert ended(names)["covered"] >= 0.9
    decays = {g["weight_decay"] for g in names["optimizer"].param_groups}
    assert decays == ({0.01, 0.0} if groups else {None})


def test_parts_behind_one_object_have_symmetries_of_their_own_and_resume_to_the_bit():
    program = PROGRAMS["Containers, as of torchtitan"]
    names = run(program)
    parts = names["optimizer"].optimizers
    assert all(ended({"optimizer": part})["covered"] >= 0.9 for part in parts)

    before, loop = program.split("for _ in range(steps):")
    half = run(f"{before}for _ in range(4):{loop}")
    again = run(before)
    for part in ("first", "last"):
        again[part].load_state_dict(half[part].state_dict())
    again["optimizer"].load_state_dict(half["optimizer"].state_dict())
    exec(f"for _ in range(4, steps):{loop}", again)
    for ours, theirs in zip(again["optimizer"].optimizers, parts, strict=True):
        assert torch.equal(ended({"optimizer": ours})["bits"], ended({"optimizer": theirs})["bits"])


def test_the_trainers_own_schedule_is_told():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(changed(TRAINER, ('    lr_scheduler_type="constant",\n', "")))
    assert any("lr has fallen" in str(w.message) for w in caught)
