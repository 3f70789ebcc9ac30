"""What a command does: the rooms put together. Each function makes, or takes up again, one folder."""

from phalanx.workflow.as_printed import attack_printed, printed_text
from phalanx.workflow.attacking import Attacked, attack_run
from phalanx.workflow.certifying import certificates_folder, certify_run
from phalanx.workflow.comparing import Comparison, compare
from phalanx.workflow.compute import cpu_threads, environment, pick_device, processor_name
from phalanx.workflow.evaluating import (
    ANALYSIS_NAME,
    EVALUATION_NAME,
    HONESTY_NAME,
    LEDGER_NAME,
    Conduct,
    evaluate_foreign,
    evaluate_run,
    evaluate_view,
    evaluation_folder,
    foreign_settings,
)
from phalanx.workflow.reporting import data_config, find_rows, report_on
from phalanx.workflow.reproducing import Reproduction, reproduction, whole_study
from phalanx.workflow.seeds import parse_seeds, report_over_seeds, seed_folder
from phalanx.workflow.smoothing import smooth_foreign, smooth_run, smoothed_folder
from phalanx.workflow.studies import Plan, default_workers, make_study, perform, plan
from phalanx.workflow.training import Trained, prepare_run, run_config, train_into, train_run

__all__ = [
    "ANALYSIS_NAME",
    "EVALUATION_NAME",
    "HONESTY_NAME",
    "LEDGER_NAME",
    "Attacked",
    "Comparison",
    "Conduct",
    "Plan",
    "Reproduction",
    "Trained",
    "attack_printed",
    "attack_run",
    "certificates_folder",
    "certify_run",
    "compare",
    "cpu_threads",
    "data_config",
    "default_workers",
    "environment",
    "evaluate_foreign",
    "evaluate_run",
    "evaluate_view",
    "evaluation_folder",
    "find_rows",
    "foreign_settings",
    "make_study",
    "parse_seeds",
    "perform",
    "pick_device",
    "plan",
    "prepare_run",
    "printed_text",
    "processor_name",
    "report_on",
    "report_over_seeds",
    "reproduction",
    "run_config",
    "seed_folder",
    "smooth_foreign",
    "smooth_run",
    "smoothed_folder",
    "train_into",
    "train_run",
    "whole_study",
]
