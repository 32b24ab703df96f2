"""Inference: a child process owns a loaded base model; the host side talks to it through one port."""
