"""Two processes on gloo: all measure, the first logs, nobody waits for ever, nothing is disturbed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, sys, warnings
from pathlib import Path
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader
from tests.callbacks.runs import Classifier, blobs, norm_and_dropout
from torch_rmt.callbacks import CriticalInit, JacobianSpectrum, SpectralMonitor

out, watched = Path(sys.argv[1]), sys.argv[2] == "with"
torch.manual_seed(0)
module = Classifier(norm_and_dropout())
monitor = SpectralMonitor(schedule=lambda step: step % 4 == 0, max_seconds=1e9)
def of_one(batch):
    "A batch that the second process cannot read: the first must not wait for it."
    if torch.distributed.get_rank() == 1:
        raise ValueError("not here")
    return batch

partly = JacobianSpectrum(schedule=lambda step: step == 2, max_seconds=1e9, batch=of_one, name="partly")
callbacks = [CriticalInit(), monitor, partly] if watched else [CriticalInit()]
trainer = pl.Trainer(
    max_epochs=2, strategy="ddp", devices=2, accelerator="cpu", callbacks=callbacks, log_every_n_steps=1,
    logger=CSVLogger(out, name="", version=""),
    enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
)
trainer.fit(module, DataLoader(blobs(), batch_size=12, shuffle=True))
state = {k: v.tolist() for k, v in module.state_dict().items()}
rank = trainer.global_rank
found = {"state": state, "measured": sorted(monitor.latest), "losses": module.losses, "partly": len(partly.latest)}
(out / f"{rank}.json").write_text(json.dumps(found))
"""


def test_all_measure_and_the_first_logs(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    (tmp_path / "script.py").write_text(SCRIPT)
    found = {}
    for name in ("with", "without"):
        out = tmp_path / name
        out.mkdir()
        done = subprocess.run(
            [sys.executable, str(tmp_path / "script.py"), str(out), name],
            capture_output=True,
            text=True,
            timeout=180,
            cwd=root,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        said = "JacobianSpectrum measures nothing at step 2. Another process could not read its batch"
        assert (said in done.stderr) == (name == "with")
        found[name] = [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)]
        header = (out / "metrics.csv").read_text().splitlines()[0]
        assert ("jacobian/mean" in header) == (name == "with")
    for rank in (0, 1):
        assert found["with"][rank]["state"] == found["without"][rank]["state"]
        assert found["with"][rank]["losses"] == found["without"][rank]["losses"]
        assert found["with"][rank]["measured"] == ["fisher", "hessian", "jacobian"]
        assert found["with"][rank]["partly"] == 0
    first, second = (found["with"][rank]["state"] for rank in (0, 1))
    # Running statistics of BatchNorm are each process's own.
    assert all(first[key] == second[key] for key in first if "running" not in key)
    lines = (tmp_path / "with" / "spectra.jsonl").read_text().splitlines()
    assert len(lines) == len({(json.loads(line)["step"], json.loads(line)["name"]) for line in lines})
