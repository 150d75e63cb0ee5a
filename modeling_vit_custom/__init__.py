"""ViT, DeiT, PVT and Swin as configurations of one staged encoder.

Importing this package registers it with the Auto classes, so its checkpoints open without `trust_remote_code`.
"""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForPreTraining,
    ViTImageProcessor,
    ViTImageProcessorPil,
)

from .configuration_vit_custom import ViTCustomConfig
from .modeling_vit_custom import (
    ViTCustomBackbone,
    ViTCustomForImageClassification,
    ViTCustomForMaskedImageModeling,
    ViTCustomForPreTraining,
    ViTCustomModel,
)
from .presets import list_presets, preset_config


AutoConfig.register(ViTCustomConfig.model_type, ViTCustomConfig)
AutoModel.register(ViTCustomConfig, ViTCustomModel)
AutoModelForImageClassification.register(ViTCustomConfig, ViTCustomForImageClassification)
AutoModelForPreTraining.register(ViTCustomConfig, ViTCustomForPreTraining)
AutoModelForMaskedImageModeling.register(ViTCustomConfig, ViTCustomForMaskedImageModeling)
AutoBackbone.register(ViTCustomConfig, ViTCustomBackbone)
# The library's own processor, so that a saved one opens without custom code.
AutoImageProcessor.register(
    ViTCustomConfig, image_processor_classes={"torchvision": ViTImageProcessor, "pil": ViTImageProcessorPil}
)

__version__ = "0.1.0"

__all__ = [
    "ViTCustomBackbone",
    "ViTCustomConfig",
    "ViTCustomForImageClassification",
    "ViTCustomForMaskedImageModeling",
    "ViTCustomForPreTraining",
    "ViTCustomModel",
    "list_presets",
    "preset_config",
]
