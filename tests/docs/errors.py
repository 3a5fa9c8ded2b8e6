def errors() -> str:
    return ""
