"""Networks of torchvision and timm: each trained, stopped, continued, and compared."""
