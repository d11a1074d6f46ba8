"""Whatever scores text: mathematics, code, SQL, format, instructions, learned rewards."""
