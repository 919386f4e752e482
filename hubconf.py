"""The trained models of weights/: torch.hub.load(REPOSITORY, "fashionmnist_lvae_rl")."""

import collections.abc
import importlib
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
dependencies = ["torch", "torchvision", "numpy", "sklearn", "joblib", "tqdm", "PIL"]


def _entry(path: pathlib.Path) -> collections.abc.Callable:
    def entry(device: str = "cpu"):
        # A user's own modules may have names of ours (models, data): outside they stay theirs.
        names = {file.stem for file in HERE.glob("*.py")}
        theirs = {name: sys.modules.pop(name) for name in names & sys.modules.keys()}
        try:
            return importlib.import_module("evaluate").load_run(path, device)[0]
        finally:
            for name in names & sys.modules.keys():
                del sys.modules[name]
            sys.modules.update(theirs)

    entry.__doc__ = f"The model of weights/{path.name}, in evaluation mode."
    return entry


globals().update({p.stem.replace("-", "_"): _entry(p) for p in HERE.glob("weights/*.pt")})
