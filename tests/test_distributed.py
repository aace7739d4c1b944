"""Several processes: who gets which pictures, what they compute together, and two nodes."""

import csv
import json
import os
import subprocess
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_modules.classifier import ImageClassifier
from lightning_modules.data import Digits
from lightning_modules.data.pictures import NO_LABEL, Pictures, as_is
from lightning_modules.data.samplers import EpochSampler, Padded
from tests.commands import metric, output_to, tnlayers
from tests.processes import COMMAND, MODULE, TORCHRUN, finish, replica, start
from tests.tolerances import EXACT, FLOAT32

# ---- who gets which pictures


def some_pictures(n: int) -> Pictures:
    """Pictures that are their place; labels are the place, modulo ten."""
    places = torch.arange(n)
    return Pictures(places.to(torch.uint8).view(n, 1, 1, 1).expand(n, 1, 8, 8), places % 10)


def batches(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [24, 25, 47])
def test_shares_are_the_batches_of_one_process(n: int, processes: int) -> None:
    """Batch k of one process with batches of w * b is what the batches k of the w processes are together."""
    whole = list(EpochSampler(some_pictures(n)))
    shares = [list(EpochSampler(some_pictures(n), processes, rank)) for rank in range(processes)]
    assert {len(share) for share in shares} == {n // processes}
    together = [sorted(chain(*parts)) for parts in zip(*(batches(share, 4) for share in shares), strict=True)]
    dealt = whole[: n // processes * processes]  # the last places do not go round
    assert together == [sorted(batch) for batch in batches(dealt, 4 * processes)]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    torch.manual_seed(5)
    sampler, other = EpochSampler(some_pictures(30)), EpochSampler(some_pictures(30))
    first, second = list(sampler), list(sampler)
    assert first != second
    torch.rand(3)
    other.set_epoch(1)
    assert list(other) == second
    torch.manual_seed(6)
    assert list(EpochSampler(some_pictures(30))) != first


def test_order_of_one_process_is_torchs_permutation() -> None:
    """What published figures were trained with: the seed times 1,000,003, plus the epoch, plus one."""
    torch.manual_seed(7)
    expected = torch.randperm(30, generator=torch.Generator().manual_seed(7 * 1_000_003 + 1)).tolist()
    assert list(EpochSampler(some_pictures(30))) == expected


def test_a_resumed_share_is_the_rest_of_it() -> None:
    whole = list(EpochSampler(some_pictures(30), 2, 1))
    assert list(EpochSampler(some_pictures(30), 2, 1, done=lambda: 8)) == whole[8:]


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_padding_makes_shares_equal_and_has_no_label(processes: int) -> None:
    padded = Padded(some_pictures(7), processes)
    assert len(padded) % processes == 0
    assert 0 <= len(padded) - 7 < processes
    pictures, labels = padded.__getitems__(range(len(padded)))
    assert labels.tolist() == [*range(7), *[NO_LABEL] * (len(padded) - 7)]
    assert pictures[:7, 0, 0, 0].tolist() == list(range(7))


def test_padding_does_not_count(tmp_path: Path) -> None:
    """Not even in a batch that holds nothing else."""
    data = Digits()
    data.setup("test")
    pictures, labels = data._test.__getitems__(range(70))  # type: ignore[union-attr]
    model = ImageClassifier()
    trainer = Trainer(logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    results = []
    for multiple in (1, 128):  # 128: a batch of 64 labels, one of 6 labels, which 58 entries fill up
        for size in (64, 2):
            loader = DataLoader(
                Padded(Pictures(pictures.float() / 255, labels), multiple), batch_size=size, collate_fn=as_is
            )
            results += trainer.test(model, loader, verbose=False)
    logits = model.eval()(pictures.float() / 255).detach()
    for result in results:
        assert result["test/accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()), abs=1e-7)
        assert result["test/loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), abs=1e-6)


# ---- two processes and one

PIECES = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
MODEL = {  # without BatchNorm, whose statistics each process has of its own
    "net": "timm/vit_tiny_patch16_224",
    "net_options": PIECES,
    "rules": [{"pattern": "blocks.0.mlp.fc1", "method": "TT", "rank": 8}],
    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
}
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "16"]
CPU = ["--trainer.accelerator", "cpu"]


def config(folder: Path, *callbacks: dict[str, object], **model: object) -> list[str]:
    """Options of a run whose every process leaves its weights in `folder`."""
    save = {"class_path": "tests.processes.SaveReplica", "init_args": {"folder": str(folder)}}
    folder.mkdir(parents=True)
    path = folder / "options.yaml"
    data = {"class_path": "tests.processes.OddDigits", "init_args": {"batch_size": 32}}
    trainer = {"callbacks": [save, *callbacks], "max_epochs": 2, "limit_train_batches": 10}
    untimed = {"enabled": False}  # each of several runs would measure something else
    options = {"data": data, "model": {**MODEL, **model}, "trainer": trainer, "autotune": untimed}
    path.write_text(yaml.safe_dump(options))
    return ["-c", str(path), *CPU, *output_to(folder)]


def predictions(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.rglob("predictions*.csv")
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one process; its last.ckpt is what the others evaluate."""
    pytest.importorskip("timm")
    folder = tmp_path_factory.mktemp("one") / "fit"
    assert tnlayers("fit", *config(folder)) == 0
    return folder


def last(folder: Path) -> Path:
    (path,) = folder.rglob("last.ckpt")
    return path


@pytest.mark.slow
def test_two_processes_train_as_one(one: Path, tmp_path: Path) -> None:
    command = [*COMMAND, "fit", *config(tmp_path / "two"), *TWO]
    code, said = finish(start(command, tmp_path))
    assert code == 0, said
    first = replica(tmp_path / "two")
    assert any("factors" in key for key in first)
    torch.testing.assert_close(replica(tmp_path / "two", 1), first, **EXACT)
    torch.testing.assert_close(first, replica(one), **FLOAT32)
    saved = torch.load(last(tmp_path / "two"), weights_only=True)
    assert saved["tensorization"]["layers"]
    torch.testing.assert_close(saved["state_dict"], first, **EXACT)
    for name in ("train/loss", "train/accuracy", "val/loss", "val/accuracy"):  # 143 validation pictures
        assert metric(tmp_path / "two", name) == pytest.approx(metric(one, name), abs=1e-4)


@pytest.mark.slow
def test_two_processes_evaluate_and_resume_as_one(one: Path, tmp_path: Path) -> None:
    """One launch for many commands: the processes run one after the other of them."""
    two, alone, whole, rest = (tmp_path / name for name in ("two", "alone", "whole", "rest"))
    stages, ckpt = ("validate", "test", "predict"), ["--ckpt_path", str(last(one))]
    for stage in stages:
        assert tnlayers(stage, *config(alone / stage), *ckpt) == 0
    jobs = [[stage, *config(two / stage), *ckpt] for stage in stages]
    steps = ["--model_checkpoint.every_n_train_steps", "7", "--model_checkpoint.save_top_k", "-1"]
    middle = whole / "logs/version_0/checkpoints/epoch=1-step=14.ckpt"
    for folder, resume in ((whole, []), (rest, ["--ckpt_path", str(middle)])):
        options = config(folder, net_options=PIECES | {"drop_rate": 0.3, "proj_drop_rate": 0.3})
        jobs.append(["fit", *options, *steps, "--data.augment", "crop", *resume])
    (tmp_path / "jobs.json").write_text(json.dumps([[*job, *TWO] for job in jobs]))
    launch = ["--standalone", "--nproc-per-node", "2", "-m", "tests.processes", tmp_path / "jobs.json"]
    code, said = finish(start([*TORCHRUN, *launch], tmp_path))
    assert code == 0, said

    for stage, name in (("validate", "val"), ("test", "test")):
        assert metric(two / stage, f"{name}/accuracy") == metric(alone / stage, f"{name}/accuracy")
        assert metric(two / stage, f"{name}/loss") == pytest.approx(metric(alone / stage, f"{name}/loss"), abs=1e-6)
    rows, expected = predictions(two / "predict"), predictions(alone / "predict")
    assert [row["picture"] for row in rows] == [str(place) for place in range(33)]
    assert [row["class"] for row in rows] == [row["class"] for row in expected]
    for rank in range(2):
        torch.testing.assert_close(replica(rest, rank), replica(whole, rank), **EXACT)


# ---- a cluster


@pytest.mark.slow
def test_requeue_by_slurm(one: Path, tmp_path: Path) -> None:
    """Its variables, its program and its signal, which meets two processes at different steps; twice the same command."""
    job, scontrol = tmp_path / "job", tmp_path / "bin/scontrol"
    usr1 = {"class_path": "tests.processes.Signalled", "init_args": {"name": "SIGUSR1", "step": 13}}
    command = [*COMMAND, "fit", *config(job, usr1), *TWO, "--ckpt_path", "last"]
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    scontrol.chmod(0o755)
    number = str(os.getpid())  # of which the port is made
    cluster = {"SLURM_JOB_ID": number, "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2"}
    cluster |= {"SLURM_NTASKS_PER_NODE": "2", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost"}
    cluster |= {"PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    for expected in (143, 0):
        ranks = [{**cluster, "SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in ("0", "1")]
        ended = [finish(process) for process in [start(command, tmp_path, **rank) for rank in ranks]]
        assert [code for code, _ in ended] == [expected, 0], ended
        assert (job / "replica0.pt").exists() == (expected == 0)
    assert (tmp_path / "requeued").read_text() == f"requeue {number}\n"
    assert len(list(job.rglob("checkpoints"))) == 1  # it went on in the same folder
    torch.testing.assert_close(replica(job, 1), replica(job), **EXACT)
    torch.testing.assert_close(replica(job), replica(one), **FLOAT32)


# ---- two nodes


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Two Linux network namespaces, joined by a cable: the names of both, which are those of their interfaces too."""
    if os.environ.get("CI"):
        pytest.skip("CI is set: network namespaces need root")
    names = [f"tn{os.getpid() % 100_000}{letter}" for letter in "ab"]
    first, second = names
    commands = [f"ip netns add {name}" for name in names]
    commands.append(f"ip link add {first} netns {first} type veth peer name {second} netns {second}")
    for number, name in enumerate(names, start=1):
        commands += [f"ip -n {name} addr add 10.77.0.{number}/24 dev {name}"]
        commands += [f"ip -n {name} link set {device} up" for device in (name, "lo")]
    try:
        for command in commands:
            try:
                subprocess.run(command.split(), check=True, capture_output=True, text=True, timeout=10)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"network namespaces are not allowed here: {command}: {getattr(error, 'stderr', error)}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=10)


@pytest.mark.slow
def test_two_nodes(nodes: list[str], one: Path, tmp_path: Path) -> None:
    fit = ["fit", *config(tmp_path / "fit"), *TWO, "--trainer.devices", "1", "--trainer.num_nodes", "2"]
    processes = []
    for rank, name in enumerate(nodes):
        meeting = ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", rank, "--master-addr", "10.77.0.1"]
        command = ["ip", "netns", "exec", name, *TORCHRUN, *meeting, *MODULE, *fit]
        processes.append(start(command, tmp_path, GLOO_SOCKET_IFNAME=name))
    for code, said in [finish(process) for process in processes]:
        assert code == 0, said
    torch.testing.assert_close(replica(tmp_path / "fit", 1), replica(tmp_path / "fit"), **EXACT)
    torch.testing.assert_close(replica(tmp_path / "fit"), replica(one), **FLOAT32)
