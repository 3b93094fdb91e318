"""Vision-language alignment: Hugging Face VLMs behind one adapter, and one file per method."""
