"""What KubeRay and Kubernetes take in a manifest, as JSON Schemas: of KubeRay 1.6.2 all fields of RayCluster and
RayJob, of Kubernetes 1.34 those fields of a pod and of a few small objects that a manifest here may use. A field that
isn't named is refused.

Names and types are facts of KubeRay's generated field reference (Apache-2.0, https://github.com/ray-project/kuberay,
its API reference at v1.6.2) and of Kubernetes' OpenAPI definitions (Apache-2.0,
https://github.com/kubernetes/kubernetes, api/openapi-spec at v1.34).
"""

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
WHOLE: Schema = {"type": "integer"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
NAMES: Schema = {"type": "object", "additionalProperties": TEXT}
QUANTITY: Schema = {"type": "string", "pattern": r"^[+-]?\d+(\.\d*)?([KMGTPE]i|[numkMGTPE]|[eE][+-]?\d+)?$"}
DNS_LABEL: Schema = {"type": "string", "pattern": r"^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def many(schema: Schema, *, least: int = 0) -> Schema:
    return {"type": "array", "items": schema, "minItems": least}


def fields(*required: str, **known: Schema) -> Schema:
    """An object with these fields and no others."""
    assert set(required) <= set(known)
    return {"type": "object", "properties": known, "required": list(required), "additionalProperties": False}


METADATA = fields(name=DNS_LABEL, namespace=DNS_LABEL, labels=NAMES, annotations=NAMES)

# ---- a pod

_RESOURCES = fields(
    requests={"type": "object", "additionalProperties": QUANTITY},
    limits={"type": "object", "additionalProperties": QUANTITY},
)
_FROM_KEY = fields("key", key=TEXT, name=TEXT, optional=FLAG)
_ENV = fields("name", name=TEXT, value=TEXT, valueFrom=fields(secretKeyRef=_FROM_KEY, configMapKeyRef=_FROM_KEY))
_EXEC = fields(command=many(TEXT, least=1))
_HTTP = fields("port", path=TEXT, port=PORT, host=TEXT, scheme=one_of("HTTP", "HTTPS"))
_PROBE = fields(
    httpGet=_HTTP,
    exec=_EXEC,
    tcpSocket=fields("port", port=PORT),
    initialDelaySeconds=COUNT,
    periodSeconds=COUNT,
    timeoutSeconds=COUNT,
    successThreshold=COUNT,
    failureThreshold=COUNT,
)
_SECCOMP = fields("type", type=one_of("RuntimeDefault", "Unconfined", "Localhost"), localhostProfile=TEXT)
_RIGHTS = fields(
    allowPrivilegeEscalation=FLAG,
    privileged=FLAG,
    readOnlyRootFilesystem=FLAG,
    runAsNonRoot=FLAG,
    runAsUser=WHOLE,
    runAsGroup=WHOLE,
    seccompProfile=_SECCOMP,
    capabilities=fields(add=many(TEXT), drop=many(TEXT)),
)
_CONTAINER = fields(
    "name",
    name=DNS_LABEL,
    image=TEXT,
    imagePullPolicy=one_of("Always", "IfNotPresent", "Never"),
    command=many(TEXT),
    args=many(TEXT),
    env=many(_ENV),
    ports=many(fields("containerPort", containerPort=PORT, name=DNS_LABEL, protocol=one_of("TCP", "UDP"))),
    resources=_RESOURCES,
    startupProbe=_PROBE,
    readinessProbe=_PROBE,
    livenessProbe=_PROBE,
    lifecycle=fields(preStop=fields(exec=_EXEC), postStart=fields(exec=_EXEC)),
    securityContext=_RIGHTS,
    volumeMounts=many(fields("name", "mountPath", name=DNS_LABEL, mountPath=TEXT, subPath=TEXT, readOnly=FLAG)),
)
_EXPRESSIONS = many(
    fields(
        "key",
        "operator",
        key=TEXT,
        operator=one_of("In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"),
        values=many(TEXT),
    )
)
_NODE_TERMS = many(fields(matchExpressions=_EXPRESSIONS, matchFields=_EXPRESSIONS), least=1)
POD_TEMPLATE = fields(
    metadata=METADATA,
    spec=fields(
        "containers",
        containers=many(_CONTAINER, least=1),
        initContainers=many(_CONTAINER),
        automountServiceAccountToken=FLAG,
        serviceAccountName=DNS_LABEL,
        priorityClassName=DNS_LABEL,
        terminationGracePeriodSeconds=COUNT,
        restartPolicy=one_of("Always", "OnFailure", "Never"),
        nodeSelector=NAMES,
        securityContext=fields(
            runAsNonRoot=FLAG, runAsUser=WHOLE, runAsGroup=WHOLE, fsGroup=WHOLE, seccompProfile=_SECCOMP
        ),
        tolerations=many(
            fields(
                key=TEXT,
                operator=one_of("Exists", "Equal"),
                value=TEXT,
                effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
                tolerationSeconds=COUNT,
            )
        ),
        affinity=fields(
            nodeAffinity=fields(
                requiredDuringSchedulingIgnoredDuringExecution=fields(
                    "nodeSelectorTerms", nodeSelectorTerms=_NODE_TERMS
                )
            )
        ),
        volumes=many(
            fields(
                "name",
                name=DNS_LABEL,
                persistentVolumeClaim=fields("claimName", claimName=DNS_LABEL, readOnly=FLAG),
                emptyDir=fields(medium=one_of("", "Memory"), sizeLimit=QUANTITY),
                secret=fields(secretName=DNS_LABEL, defaultMode=WHOLE, optional=FLAG),
            )
        ),
    ),
)

# ---- KubeRay

_GROUP: dict[str, Schema] = {
    "template": POD_TEMPLATE,
    "rayStartParams": NAMES,
    "resources": NAMES,
    "labels": NAMES,
}
_REDIS = fields(value=TEXT, valueFrom=fields(secretKeyRef=_FROM_KEY))
RAY_CLUSTER_SPEC = fields(
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=fields(mode=one_of("disabled", "token"), secretName=DNS_LABEL, enableK8sTokenAuth=FLAG),
    autoscalerOptions=fields(
        resources=_RESOURCES,
        image=TEXT,
        imagePullPolicy=TEXT,
        securityContext=_RIGHTS,
        idleTimeoutSeconds=WHOLE,
        upscalingMode=one_of("Default", "Aggressive", "Conservative"),
        version=one_of("v1", "v2"),
        env=many(_ENV),
    ),
    enableInTreeAutoscaling=FLAG,
    gcsFaultToleranceOptions=fields(
        redisUsername=_REDIS, redisPassword=_REDIS, redisAddress=TEXT, externalStorageNamespace=TEXT
    ),
    headServiceAnnotations=NAMES,
    managedBy=one_of("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"),
    suspend=FLAG,
    upgradeStrategy=fields(type=one_of("Recreate", "None")),
    headGroupSpec=fields(
        "template", **_GROUP, enableIngress=FLAG, serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer")
    ),
    workerGroupSpecs=many(
        fields(
            "groupName",
            "maxReplicas",
            "minReplicas",
            "template",
            **_GROUP,
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            numOfHosts=COUNT,
            idleTimeoutSeconds=COUNT,
            suspend=FLAG,
            scaleStrategy=fields(workersToDelete=many(TEXT)),
        )
    ),
)
_RAY_JOB_SPEC = fields(
    activeDeadlineSeconds=WHOLE,
    backoffLimit=COUNT,
    clusterSelector=NAMES,
    entrypoint=TEXT,
    entrypointNumCpus=NUMBER,
    entrypointNumGpus=NUMBER,
    entrypointResources=TEXT,
    jobId=TEXT,
    managedBy=one_of("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"),
    metadata=NAMES,
    preRunningDeadlineSeconds={"type": "integer", "minimum": 1},
    rayClusterSpec=RAY_CLUSTER_SPEC,
    runtimeEnvYAML=TEXT,
    shutdownAfterJobFinishes=FLAG,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    submitterConfig=fields(backoffLimit=COUNT),
    submitterPodTemplate=POD_TEMPLATE,
    suspend=FLAG,
    ttlSecondsAfterFinished=COUNT,
)

# ---- small objects of Kubernetes

_LABELS = fields(matchLabels=NAMES, matchExpressions=_EXPRESSIONS)
_PEER = fields(podSelector=_LABELS, namespaceSelector=_LABELS)
_POLICY_PORT = fields(protocol=one_of("TCP", "UDP", "SCTP"), port=PORT, endPort=PORT)


def _object(version: str, kind: str, *required: str, **known: Schema) -> Schema:
    place = {"apiVersion": one_of(version), "kind": one_of(kind), "metadata": METADATA | {"required": ["name"]}}
    return fields("apiVersion", "kind", "metadata", *required, **place, **known)


KINDS: dict[str, Schema] = {
    "RayCluster": _object("ray.io/v1", "RayCluster", "spec", spec=RAY_CLUSTER_SPEC),
    "RayJob": _object("ray.io/v1", "RayJob", "spec", spec=_RAY_JOB_SPEC),
    "PersistentVolumeClaim": _object(
        "v1",
        "PersistentVolumeClaim",
        "spec",
        spec=fields(
            accessModes=many(one_of("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"), least=1),
            resources=_RESOURCES,
            storageClassName=TEXT,
        ),
    ),
    "PriorityClass": _object(
        "scheduling.k8s.io/v1",
        "PriorityClass",
        "value",
        value=WHOLE,
        preemptionPolicy=one_of("Never", "PreemptLowerPriority"),
        globalDefault=FLAG,
        description=TEXT,
    ),
    "NetworkPolicy": _object(
        "networking.k8s.io/v1",
        "NetworkPolicy",
        "spec",
        spec=fields(
            "podSelector",
            podSelector=_LABELS,
            policyTypes=many(one_of("Ingress", "Egress")),
            ingress=many(fields(**{"from": many(_PEER)}, ports=many(_POLICY_PORT))),
        ),
    ),
}
"""Of every kind that a manifest here may have."""
