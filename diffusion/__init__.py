"""Text-to-image alignment: Stable Diffusion models behind one interface, and one file per method."""
