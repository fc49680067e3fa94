"""The embedded world of coloured shapes, with the six GenEval tasks and a detector that reads pixels."""
