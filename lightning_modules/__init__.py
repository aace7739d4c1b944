"""Lightning training for networks with tensorized layers: classifier, data, nets, compression, reports, command line."""

from lightning_modules.classifier import ImageClassifier, load_net, load_weights
from lightning_modules.compression import Compression, compress
from lightning_modules.nets import NETS, build_net
from lightning_modules.report import Report

__all__ = ["NETS", "Compression", "ImageClassifier", "Report", "build_net", "compress", "load_net", "load_weights"]
