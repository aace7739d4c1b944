"""The truncation study: which cuts of which layers a trained network can do without, and what retraining brings back.

`measurement` measures and `report` tells. Between them stand the rows of a study, which are lines
of its journal, and its findings, which the rows add up to.
"""

from lightning_modules.study.findings import Findings
from lightning_modules.study.journal import JOURNAL, read_rows, study_folder
from lightning_modules.study.measurement.run import run_study
from lightning_modules.study.measurement.subject import Subject
from lightning_modules.study.report.log import log_study
from lightning_modules.study.report.rendering import summary, write_report
from lightning_modules.study.rows import Protocol

__all__ = [
    "JOURNAL",
    "Findings",
    "Protocol",
    "Subject",
    "log_study",
    "read_rows",
    "run_study",
    "study_folder",
    "summary",
    "write_report",
]
