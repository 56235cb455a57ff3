// placeholder, replaced by the op
