"""An invented log of a whole run, and a browser that reads its report."""

import json
import math
import os
import random
import select
import shutil
import subprocess
from pathlib import Path
from typing import Any

from gptperf.monitor.waterfall import PARTS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PLAN = {
    "gpu": "H200",
    "memory_gb": 70.1,
    "memory_parts_gb": {"activations": 43.2, "optimizer": 10.9, "gradients": 5.5, "weights": 8.2, "other": 2.3},
    "limit_gb": 139.0,
    "fits": True,
    "step_ms": 3920.0,
    "parts_ms": {"gemm": 2500.0, "attention": 700.0, "memory_bound": 500.0, "optimizer": 220.0},
    "band": 0.1,
    "tokens_per_sec": 66_873.0,
    "mfu_percent": 56.8,
}
INFO = {
    "total_parameters": 1_364_297_728,
    "n_layer": 24,
    "max_iters": 6000,
    "tokens_per_iter": 262_144,
    "components": {"normalization": "rmsnorm", "ffn_type": "swiglu", "bias": False, "ffn_width": 5632},
    "kernels": {"rms_norm": "triton", "rope": "triton", "adamw": "eager"},
    "kernel_reasons": {"adamw": "asked for"},
    "device": "NVIDIA H200",
    "num_gpus": 1,
    "memory_gb": 150.1,
    "hardware_peak_tflops": 989.4,
    "peak_basis": "dense",
    "convention": "strict",
    "flops_per_token": 8_396_242_944,
    "versions": {"torch": "2.11.0+cu130", "triton": "3.6.0"},
    "plan": PLAN,
    "notes": ["plan: 70.1 GB of 139.0 a GPU, fits"],
}
CONFIG = {
    "model": {"n_layer": 24, "normalization": "rmsnorm", "d_ff": None},
    "optimizer": {"learning_rate": 3e-4, "grad_clip": 1.0},
    "train": {"max_iters": 6000, "seed": 1337},
    "origins": {
        "n_layer": "configs/llama_1.36b.toml",
        "normalization": "preset llama (configs/llama_1.36b.toml)",
        "d_ff": "default",
        "learning_rate": "command line",
        "grad_clip": "default",
        "max_iters": "command line",
        "seed": "default",
    },
}


def iteration(step: int, most: int, noise: random.Random) -> dict[str, Any]:
    """One logged step of a run of 24 layers that has a spike in its middle."""
    spike = most // 2 <= step < most // 2 + most // 100
    loss = 2.4 + 8.5 * math.exp(-step / (0.04 * most)) + 0.9 * math.exp(-step / (0.5 * most)) + noise.gauss(0, 0.03)
    loss += 1.5 * spike
    norm = (0.35 + 6 * math.exp(-step / (0.02 * most))) * math.exp(noise.gauss(0, 0.15)) * (1 + 8 * spike)
    layers = ["embedding", *map(str, range(24)), "head"]
    shares = [math.exp(-(((i - 14) / 4) ** 2)) for i in range(26)]
    total = sum(shares)
    ms = 3951 + noise.gauss(0, 9) + (300 if noise.random() < 0.01 else 0)
    speed = 262_144 / ms * 1e3
    mfu = {"mfu_percent": 8.396242944e9 * speed / 989.4e10, "tokens_per_sec": speed}
    grow = min(1.0, 0.9 + step / most)
    lr = 3e-4 * min(step / (0.03 * most), 0.55 + 0.45 * math.cos(math.pi * step / most))
    return {
        "iter": step,
        "loss": loss,
        "time_ms": ms,
        "data_wait_ms": 0.4 + noise.random() / 5,
        "lr": lr,
        "tokens": 262_144 * step,
        "mfu": {} if step == 1 else mfu | {"achieved_tflops": mfu["mfu_percent"] * 9.894, "of_ceiling_percent": 81.0},
        "memory": {"allocated_gb": 27.3 * grow, "peak_gb": 69.9 * grow, "reserved_gb": 74.2 * grow},
        "gradients": {
            "global_norm": norm,
            "grad_mean": 1e-8,
            "grad_std": 1e-5,
            "grad_min": -0.02,
            "grad_max": 0.03,
            "zero_share": 0.002 + 0.03 * math.exp(-step / (0.1 * most)),
            "non_finite": 0,
            "layer_norms": {
                name: norm * (0.08 + 0.3 / (1 + place)) * math.exp(noise.gauss(0, 0.1))
                for place, name in enumerate(layers)
            },
            "component_norms": {"attention": 0.5 * norm, "ffn": 0.7 * norm, "norm": 0.04 * norm, "lm_head": 0.4 * norm},
            "histogram": {"log2_edges": list(range(-30, -5)), "shares": [share / total for share in shares]},
            "update_ratios": {"attention": 2e-3 * lr / 3e-4, "ffn": 1.5e-3 * lr / 3e-4, "norm": 1e-4 * lr / 3e-4},
        },
        "stability": {
            "window": 100,
            "loss_mean": loss,
            "loss_variance": 0.001,
            "spike": spike,
            "plateau": 0.8 * most < step < 0.85 * most,
            "non_finite": 0,
        },
    }


def events(most: int = 6000, entries: int = 120) -> list[dict[str, Any]]:
    """Returns the events of the journal."""
    noise, every = random.Random(0), most // entries
    found: list[dict[str, Any]] = [{"event": "start", "start_time": "2026-01-02T03:04:05", "config": CONFIG}]
    found[0]["startup_info"] = INFO
    found += [{"event": "iteration", **iteration(step, most, noise)} for step in (1, *range(every, most + 1, every))]
    best = math.inf
    for step in range(most // 12, most + 1, most // 12):
        val = 2.45 + 8.5 * math.exp(-step / (0.04 * most)) + 0.9 * math.exp(-step / (0.5 * most))
        best = min(best, val)
        found.append({"event": "eval", "iter": step, "val_loss": val, "best_val_loss": best, "time_ms": 9000.0})
        tasks = {"arc_easy": {"items": 2376, "acc": 0.25 + 0.2 * step / most, "acc_stderr": 0.0102, "centred": 0.1}}
        tasks["lambada"] = {"items": 5153, "acc": 0.4 * step / most, "perplexity": 36.5, "perplexity_stderr": 1.25}
        found[-1] |= {"tasks": tasks, "core": 0.2125, "core_stderr": 0.0065, "tasks_ms": 4000.0}
        path = f"out/checkpoints/step-{step:08d}"
        found.append({"event": "checkpoint", "iter": step, "path": path, "val_loss": val, "time_ms": 8123.0})
    lost = {**dict.fromkeys(PARTS, 0.5), "gemm": 17.0, "attention": 11.5, "memory_bound": 9.0, "optimizer": 2.8}
    kernels = [{"name": "nvjet_hsh_256x128", "part": "gemm", "ms": 812.0, "calls": 1344}]
    profile = {"iter": 50, "trace": "out/trace.json.gz", "steps": 5, "step_ms": 3999.0, "kernels": kernels}
    profile |= {"parts_ms": dict.fromkeys(PARTS, 499.9), "waterfall": lost, "mfu_percent": 100 - sum(lost.values())}
    found.append({"event": "profile", **profile})
    found.append({"event": "message", "level": "warning", "text": "power cap 500 W below the default", "iter": 1})
    actual = {"planned_memory_gb": 70.1, "peak_gb": 69.9}
    actual |= {"planned_tokens_per_sec": 66_873.0, "tokens_per_sec": 66_346.0}
    summary = {"event": "summary", "wall_time_s": 24_321.0, "tokens_per_sec": 66_346.0, "mfu_percent": 56.3}
    found.append(summary | {"plan": actual, "trigram_loss": 4.1, "sample": "def f(x):\n    return x"})
    return found


def write_journal(folder: Path, lines: list[dict[str, Any]], name: str = "run_20260102_030405") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Browser:
    """Headless Chromium under the DevTools protocol, through a pipe; no name resolves."""

    def __init__(self, folder: Path) -> None:
        reads, self._out = os.pipe()
        self._in, writes = os.pipe()
        self.net_log = folder / "net.json"
        command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--no-first-run", "--disable-extensions", "--disable-background-networking", "--disable-sync"]
        command += ["--disable-component-update", "--disable-default-apps", "--host-resolver-rules=MAP * ~NOTFOUND"]
        command += [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={self.net_log}"]
        command += ["--remote-debugging-pipe"]
        shell = ["bash", "-c", f'exec "$@" 3<&{reads} 4>&{writes}', "bash", *command]
        self._process = subprocess.Popen(
            shell, pass_fds=(reads, writes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(reads)
        os.close(writes)
        self._count, self._rest, self.session = 0, b"", ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._in], [], [], 60)[0], "no answer from the browser"
            data = os.read(self._in, 1 << 20)
            assert data, "the browser ended"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, page: Path, width: int) -> None:
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        self.call("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def evaluate(self, script: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"]["value"]

    def asked(self) -> set[str]:
        """Addresses that a page asked the network for, after `close`; the browser's own errands have no origin."""
        log = json.loads(self.net_log.read_text())
        kind = log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
        found = [event["params"] for event in log["events"] if event["type"] == kind and "url" in event["params"]]
        return {params["url"] for params in found if params.get("initiator") != "not an origin"}

    def complaints(self) -> list[str]:
        """Script errors, console lines, violations of the policy, and resources that did not load."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.events if event.get("method") in kinds]

    def close(self) -> None:
        self.session = ""
        self.call("Browser.close")
        self._process.wait(30)
        os.close(self._in)
        os.close(self._out)
