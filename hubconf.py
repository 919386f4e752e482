"""The trained models of weights/: torch.hub.load(REPOSITORY, "fashionmnist_lvae_rl")."""

from collections.abc import Callable
from pathlib import Path

import evaluate
from models import Network

dependencies = ["torch", "torchvision", "numpy", "sklearn", "joblib", "tqdm", "PIL"]


def _entry(path: Path) -> Callable[..., Network]:
    def entry(device: str = "cpu") -> Network:
        return evaluate.load_run(path, device)[0]

    entry.__doc__ = f"The model of weights/{path.name}, in evaluation mode."
    return entry


for _path in Path(__file__).parent.glob("weights/*.pt"):
    globals()[_path.stem.replace("-", "_")] = _entry(_path)
