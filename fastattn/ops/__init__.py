"""One folder for each op: the public function, its definition (reference.py), its declaration (schema.py) and its backends."""
