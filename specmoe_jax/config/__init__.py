"""What a user chooses, as frozen dataclasses: the plan with its fields and checks, presets, model and layer configs, sampling."""
