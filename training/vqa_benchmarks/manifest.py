"""The name under which lmms-eval finds TinyAlign. Its entry points are read while it is imported: no more is here."""

from lmms_eval.models.registry_v2 import ModelManifest

manifest = ModelManifest("tinyalign", chat_class_path=f"{__package__}.lmms_model.TinyAlignLmms")
