"""Models by name: three registries with VeOmni's interface, and how to enter VeOmni and transformers' Auto classes.

    config = MODEL_CONFIG_REGISTRY["qwen3_vl_moe"]().from_pretrained(path)
    model = build_model(config)                        # random weights, or the meta device's none
    register_with_veomni()                             # VeOmni's build_foundation_model now builds this model
    register_with_transformers()                       # and so does AutoModelForImageTextToText

Registered are functions, not classes: a look-up by name imports nothing until the class is asked for. Nothing registers
itself elsewhere at import; the two calls above are opt-in.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from modeling.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeConfig

MODEL_TYPE = "qwen3_vl_moe"


class Registry(Mapping[str, Callable[..., Any]]):
    """Name -> function, filled by a decorator."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._entries: dict[str, Callable[..., Any]] = {}

    def register(self, key: str, value: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """`@registry.register("name")` above a function; or `registry.register("name", function)`, which replaces.

        Raises:
            ValueError: the decorator meets a name that is taken.
        """
        if value is not None:
            self._entries[key] = value
            return value

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            if key in self._entries:
                raise ValueError(
                    f"{self.name} registry: {key!r} is taken by {self._entries[key].__qualname__}; choose another "
                    "name, or replace it with .register(name, function)."
                )
            self._entries[key] = function
            return function

        return decorate

    def valid_keys(self) -> list[str]:
        """The registered names."""
        return list(self._entries)

    def __getitem__(self, key: str) -> Callable[..., Any]:
        if key not in self._entries:
            raise ValueError(f"{self.name} registry: {key!r} is unknown; it has {', '.join(self._entries) or 'none'}.")
        return self._entries[key]

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


MODEL_CONFIG_REGISTRY = Registry("config")
"""model_type -> a function that returns the config class."""
MODELING_REGISTRY = Registry("modeling")
"""model_type -> a function of the architecture's name that returns the model class."""
MODEL_PROCESSOR_REGISTRY = Registry("processor")
"""Class name of a processor -> a function that returns that class."""


# PATCH(veomni-registry): config, modeling and processor by the names under which VeOmni looks for them
@MODEL_CONFIG_REGISTRY.register(MODEL_TYPE)
def register_qwen3_vl_moe_config() -> type[Qwen3VLMoeConfig]:
    return Qwen3VLMoeConfig


@MODELING_REGISTRY.register(MODEL_TYPE)
def register_qwen3_vl_moe_modeling(architecture: str | None = None) -> type[PreTrainedModel]:
    from modeling.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeModel

    classes = {
        None: Qwen3VLMoeForConditionalGeneration,
        "Qwen3VLMoeForConditionalGeneration": Qwen3VLMoeForConditionalGeneration,
        "Qwen3VLMoeForCausalLM": Qwen3VLMoeForConditionalGeneration,
        "Qwen3VLMoeModel": Qwen3VLMoeModel,
    }
    if architecture not in classes:
        raise ValueError(
            f"architecture {architecture!r} is not one of {', '.join(filter(None, classes))}; check `architectures` in "
            "config.json."
        )
    return classes[architecture]


# What published checkpoints name, and the name under which this project imports the same class.
@MODEL_PROCESSOR_REGISTRY.register("Qwen3VLProcessor")
@MODEL_PROCESSOR_REGISTRY.register("Qwen3VLMoeProcessor")
def register_qwen3_vl_moe_processor() -> type:
    from modeling.qwen3_vl_moe.processing_qwen3_vl_moe import Qwen3VLMoeProcessor

    return Qwen3VLMoeProcessor


def build_model(config: PreTrainedConfig) -> Any:
    """The model that a config describes, on the current default device, with random weights.

    Args:
        config: this project's, or another with its model_type (transformers' own), which is translated.

    Raises:
        ValueError: a model_type or an architecture that is not registered.
    """
    config_class = MODEL_CONFIG_REGISTRY[config.model_type]()
    if not isinstance(config, config_class):
        config = config_class(**config.to_dict())
    architectures = config.architectures or [None]
    return MODELING_REGISTRY[config.model_type](architectures[0])(config)


def register_with_veomni() -> None:
    """Put this model in the place of VeOmni's own: its `build_foundation_model` and trainers build it from then on.

    Raises:
        ImportError: VeOmni is not installed.
    """
    from modeling.qwen3_vl_moe.veomni import config_class, model_class

    try:
        from veomni.models import loader
    except ModuleNotFoundError as error:
        raise ImportError(f"register_with_veomni() needs VeOmni with its dependencies: {error}") from error
    loader.MODEL_CONFIG_REGISTRY.register(MODEL_TYPE, config_class)
    loader.MODELING_REGISTRY.register(MODEL_TYPE, model_class)
    for name, processor in MODEL_PROCESSOR_REGISTRY.items():
        loader.MODEL_PROCESSOR_REGISTRY.register(name, processor)


def register_with_transformers() -> None:
    """Put this model behind AutoConfig, AutoModel, AutoModelForImageTextToText and AutoProcessor, in place of
    transformers' own, for the rest of this process. transformers' classes stay what they are under their own names."""
    from modeling.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeModel
    from modeling.qwen3_vl_moe.processing_qwen3_vl_moe import Qwen3VLMoeProcessor

    AutoConfig.register(MODEL_TYPE, Qwen3VLMoeConfig, exist_ok=True)
    AutoModel.register(Qwen3VLMoeConfig, Qwen3VLMoeModel, exist_ok=True)
    AutoModelForImageTextToText.register(Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(Qwen3VLMoeConfig, Qwen3VLMoeProcessor, exist_ok=True)
