"""The truncation study: which cuts of which layers a trained network can do without, and what retraining brings back."""

from lightning_modules.study.findings import Measured
from lightning_modules.study.journal import JOURNAL, read_rows, study_folder
from lightning_modules.study.report import summary, write_report
from lightning_modules.study.rows import Protocol
from lightning_modules.study.run import run_study
from lightning_modules.study.subject import Subject

__all__ = [
    "JOURNAL",
    "Measured",
    "Protocol",
    "Subject",
    "read_rows",
    "run_study",
    "study_folder",
    "summary",
    "write_report",
]
