"""GenEval: prompts, decision rules and table, for the detections of any detector."""
