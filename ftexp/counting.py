"""Numbers with their nouns, as messages and reports print them."""


def counted(number: int, thing: str) -> str:
    """Return a number with its noun, "1 epoch" or "1,200 epochs"."""
    plural = f"{thing}es" if thing.endswith("s") else f"{thing}s"
    return f"{number:,} {thing if number == 1 else plural}"
