"""One folder an op: the public function, its definition (reference.py), its registration (schema.py) and its backends."""
