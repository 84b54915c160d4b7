# SPDX-License-Identifier: BSD-3-Clause
"""Packages that an integration is for, and which nothing else of this package needs."""

import importlib
from types import ModuleType
from typing import Any


def needed(integration: str, module: str, install: str) -> ModuleType:
    """``module``, or in one sentence what is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = f"masked_loss_ext.integrations.{integration}"
        raise ModuleNotFoundError(
            f"{name} needs {install} ({error.name} is missing): pip install {install}",
            name=error.name,
        ) from None


def known(integration: str, module: ModuleType, *names: str) -> Any:
    """What ``module`` has by these names, or in one sentence that this release has it not."""
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        raise ImportError(
            f"masked_loss_ext.integrations.{integration} does not know this release: "
            f"{module.__name__} has no {', '.join(missing)}",
            name=module.__name__,
        )
    found = [getattr(module, name) for name in names]
    return found if len(names) > 1 else found[0]
