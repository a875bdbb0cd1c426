"""Commands that measure: presets side by side, kernels, disks, a machine with a GPU."""
