"""Run folders: files that survive a kill, checksums, the lock, the ledger of verdicts, and studies.

Checkpoints live in `phalanx.runs.checkpoint`, the one file here that needs torch, and are not imported with
this package: reports read runs without it.
"""

from __future__ import annotations

from phalanx.runs.atomic import sha256_file, write_bytes, write_json, write_text
from phalanx.runs.folder import RunFolder
from phalanx.runs.ledger import Binding, Ledger
from phalanx.runs.lock import RunLock
from phalanx.runs.manifest import verify_manifest, write_manifest
from phalanx.runs.metrics import MetricsLog, read_metrics
from phalanx.runs.study import Node, Study
from phalanx.runs.summary import AttackSummary, Summary, summarise, wilson
from phalanx.runs.verdict import Verdict

__all__ = [
    "AttackSummary",
    "Binding",
    "Ledger",
    "MetricsLog",
    "Node",
    "RunFolder",
    "RunLock",
    "Study",
    "Summary",
    "Verdict",
    "read_metrics",
    "sha256_file",
    "summarise",
    "verify_manifest",
    "wilson",
    "write_bytes",
    "write_json",
    "write_manifest",
    "write_text",
]
