"""Backbones, one file per family. Importing this package registers them with timm."""
