"""One fusion looked at: how it weighs its adapters, and what that means."""
