"""A fine-grained mixture of experts in the form of GLM-4.5-Air, trained from scratch: model, data, recipe, export, figures."""
