"""stub"""
def write_page(out, facts, *, config_text): pass
