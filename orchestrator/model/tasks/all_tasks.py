"""The task of a job."""

from orchestrator.model.task import Task
from orchestrator.model.tasks.chats import ChatModeling
from orchestrator.model.tasks.classification import Classification
from orchestrator.model.tasks.language_modeling import LanguageModeling
from orchestrator.model.tasks.preference import DirectPreference
from orchestrator.model.tasks.user_task import UserTask
from orchestrator.spec.task import CLASSIFICATION, DPO, MESSAGES, PREFERENCE, SFT, TEXT, DataFormat, TaskSpec


def task_of(spec: TaskSpec, data_format: DataFormat = TEXT) -> Task:
    """The task that a section names. Raises EntrypointError for one of the user's that can't be made."""
    if spec.entrypoint is not None:
        of_chats: dict[DataFormat, Task] = {MESSAGES: ChatModeling(), PREFERENCE: DirectPreference(spec.beta)}
        return UserTask(spec, of_chats.get(data_format))
    if spec.name == SFT:
        return ChatModeling()
    if spec.name == DPO:
        return DirectPreference(spec.beta, spec.label_smoothing)
    if spec.name == CLASSIFICATION:
        return Classification(spec.inputs, spec.labels)
    return LanguageModeling()
