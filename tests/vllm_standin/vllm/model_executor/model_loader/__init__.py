"""Loaders by their load format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from vllm.config import LoadConfig, ModelConfig

Loader = TypeVar("Loader", bound=type)
_LOADERS: dict[str, type[BaseModelLoader]] = {}


class BaseModelLoader(ABC):
    """Base of every loader."""

    def __init__(self, load_config: LoadConfig) -> None:
        self.load_config = load_config

    @abstractmethod
    def download_model(self, model_config: ModelConfig) -> None:
        """Bring a model, so that it can be loaded at once."""

    @abstractmethod
    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Load weights into a model."""


def register_model_loader(load_format: str) -> Callable[[Loader], Loader]:
    """Make a loader known by the name of its load format."""

    def register(kind: Loader) -> Loader:
        if not issubclass(kind, BaseModelLoader):
            raise ValueError("The model loader must be a subclass of `BaseModelLoader`.")
        _LOADERS[load_format] = kind
        return kind

    return register


def get_model_loader(load_config: LoadConfig) -> BaseModelLoader:
    """Give the loader of a load format."""
    if load_config.load_format not in _LOADERS:
        raise ValueError(f"Load format `{load_config.load_format}` is not supported")
    return _LOADERS[load_config.load_format](load_config)
