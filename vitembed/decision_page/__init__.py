"""The page of one decision, for the person who answers for it: `write_decision_page`."""

from vitembed.decision_page.page import write_decision_page

__all__ = ["write_decision_page"]
