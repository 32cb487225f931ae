"""Vision linear attention: operators, layers and timm-compatible backbones."""
