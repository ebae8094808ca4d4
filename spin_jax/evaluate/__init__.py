"""Measuring a model: tasks of lm-evaluation-harness, MT-Bench answers, held-out answers and verifiers."""
