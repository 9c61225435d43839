"""Measures this machine and keeps the timings. Makes no plan and knows no session."""
