"""The six tasks of the LoRA-Flow paper, as task files of lm-evaluation-harness."""
