"""Hugging Face checkpoints as pytrees and back: configs, tensor names, files, PEFT adapters, processors."""
