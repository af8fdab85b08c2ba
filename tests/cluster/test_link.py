"""Two hosts in network namespaces, which train together by torchrun over veth; the link between them is cut."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 10


@dataclass(frozen=True)
class Hosts:
    """Two namespaces; host N has the address 10.213.77.N on the interface `wire`."""

    names: tuple[str, str]

    def link(self, state: str) -> None:
        ip("-n", self.names[0], "link", "set", "wire", state)

    def start(self, number: int, port: int, out: Path, *verb: str | Path) -> subprocess.Popen[bytes]:
        """Start torchrun on a host, under that host's name."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(number - 1)]
        torchrun += ["--nproc-per-node", "1", "--master-addr", "10.213.77.1", "--master-port", str(port)]
        words = [*torchrun, "-m", "harken.apps.main", *map(str, verb)]
        on_host = ["ip", "netns", "exec", self.names[number - 1], "unshare", "--uts", "sh", "-c"]
        environment = {
            **os.environ,
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "PYTHONPATH": str(ROOT / "framework"),
            "GLOO_SOCKET_IFNAME": "wire",
            "CUDA_VISIBLE_DEVICES": "",
        }
        with out.open("ab") as stream:
            return subprocess.Popen(
                [*on_host, 'hostname "$0"; exec "$@"', f"host{number}", *words],
                env=environment,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )


def ip(*words: str) -> None:
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    done = subprocess.run(["ip", *words], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"`ip {' '.join(words)}`: {done.stderr.strip()}")


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None or shutil.which("unshare") is None:
        pytest.skip("`ip` and `unshare` are not installed: apt-get install iproute2 util-linux")
    names = (f"harken-{os.getpid()}-1", f"harken-{os.getpid()}-2")
    made = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
            ip("link", "add", "wire", "netns", names[0], "type", "veth", "peer", "name", "wire", "netns", names[1])
        except OSError as error:
            pytest.skip(f"network namespaces are not permitted here: {error}")
        for number, name in enumerate(names, start=1):
            ip("-n", name, "address", "add", f"10.213.77.{number}/24", "dev", "wire")
            for device in ("lo", "wire"):
                ip("-n", name, "link", "set", device, "up")
        yield Hosts(names)
    finally:
        for name in made:
            ip("netns", "delete", name)


def test_a_link_that_is_cut_ends_both_sides_and_the_run_goes_on_when_it_is_back(
    hosts: Hosts, corpus, wait, runs, tmp_path: Path
) -> None:
    exp, whole, steps = tmp_path / "exp", tmp_path / "whole", 60
    config = runs.write_config(corpus, tmp_path / "config.yaml", steps)
    settings = OmegaConf.load(config)
    settings.engine.timeout_seconds = TIMEOUT
    OmegaConf.save(settings, config)
    verb = ["train", config, "--exp", exp]
    outs = [tmp_path / "host1.out", tmp_path / "host2.out"]

    def tell() -> str:
        return "\n".join(out.read_text()[-4000:] for out in outs)

    sides = [hosts.start(number, 29411, outs[number - 1], *verb) for number in (1, 2)]
    try:
        wait(lambda: runs.last_step(exp) >= 5, 240, tell)
        hosts.link("down")
        cut_at = runs.last_step(exp)
        for side in sides:
            assert side.wait(6 * TIMEOUT + 60) != 0, tell()
        assert cut_at <= runs.last_step(exp) < steps, "it was cut in the middle"
        for out in outs:
            (message,) = [line for line in out.read_text().splitlines() if line.startswith("harken: ")]
            assert re.search(r"rank [01] \(process \d+ on host[12]\) has made no progress for \d+ s", message), message
            assert "The ranks are on host1, host2: is the network between these up?" in message
            assert "the same command goes on from the last checkpoint" in message
        hosts.link("up")
        sides = [hosts.start(number, 29412, outs[number - 1], *verb) for number in (1, 2)]
        for side in sides:
            assert side.wait(300) == 0, tell()
    finally:
        for side in sides:
            side.terminate()  # torchrun ends its rank with it
            side.wait(60)
    assert "continuing from" in outs[0].read_text()
    subprocess.run([sys.executable, "-m", "harken.apps.main", "train", config, "--exp", whole], check=True)
    assert runs.samples(exp) == runs.samples(whole)
