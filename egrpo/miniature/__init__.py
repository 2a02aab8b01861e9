"A small FLUX on drawn shapes, and a verifier that looks at the pixels."
