"""`loraflow demo`: the whole job on the built-in small world."""


def demo() -> None:
    """x"""
