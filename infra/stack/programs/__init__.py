"""The programs of the stack, one module each; the table is in `infra.stack.programs.table`."""
