"""Inner problems: small tasks that an optimizer is meta-trained on, chosen by and measured on."""
