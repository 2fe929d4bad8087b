"""Several processes that serve as one: a supervisor, which accepts connections, and its workers, which answer."""
