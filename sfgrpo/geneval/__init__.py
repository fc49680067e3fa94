"""GenEval: prompts, decision rules, training reward and table, for detections of any detector."""
